// SPDX-License-Identifier: Apache-2.0

public import LinuxSystem
public import SystemPackage
public import Userfault

/// What guest memory is made of, in the words of the command line.
public enum MemoryBacking: Hashable, Sendable, CustomStringConvertible {
  /// Private anonymous memory: MISSING only.
  case anonymous
  /// A memfd on tmpfs: MISSING and MINOR.
  case memfd
  /// A memfd on hugetlbfs: MISSING and MINOR, whole huge pages.
  case hugetlb(PageSize)
  /// A guest_memfd, which a virtual machine makes (`GuestMemoryObject.init(guestMemfd:)`).
  case guestMemfd

  /// Bytes of one page, the unit of a fault.
  public var pageSize: PageSize {
    if case .hugetlb(let size) = self { size } else { .size4KiB }
  }

  /// The kind of memory as userfaultfd sees it.
  public var kind: MemoryKind {
    switch self {
    case .anonymous: .anonymous
    case .memfd: .memfd
    case .hugetlb(let size): .hugetlb(size)
    case .guestMemfd: .guestMemfd
    }
  }

  /// The backings that the command line offers.
  public static let allNamed: [MemoryBacking] = [
    .anonymous, .memfd, .hugetlb(.size2MiB), .hugetlb(.size1GiB), .guestMemfd,
  ]

  /// The backing with that name.
  public init?(name: String) {
    guard let match = Self.allNamed.first(where: { $0.description == name }) else { return nil }
    self = match
  }

  /// "anonymous", "memfd", "hugetlb-2M", "hugetlb-1G" or "guest_memfd".
  public var description: String { kind.description }
}

/// Memory for a guest: the mapping that the guest uses, and for shared memory the
/// object behind it.
///
/// Owns both; they go away together, so a guest and its pager must be gone first.
public struct GuestMemoryObject: ~Copyable, Sendable {
  /// What it is made of.
  public let backing: MemoryBacking
  /// The mapping that the guest uses.
  public let mapping: Mapping
  /// The object behind it; `nil` for anonymous memory.
  public let file: MemoryFile?

  /// Memory that reads as zero.
  ///
  /// Huge pages are reserved here: `noMemory` when the pool has too few.
  /// - Parameter length: bytes, a multiple of the backing's page size.
  public init(backing: MemoryBacking, length: Int) throws(Errno) {
    guard length > 0, backing.pageSize.divides(length), backing != .guestMemfd else {
      throw .invalidArgument
    }
    guard backing != .anonymous else {
      // 2 MiB alignment lets KVM and the kernel use large mappings where they can.
      self.init(
        backing: backing,
        mapping: try Mapping(anonymous: length, alignment: PageSize.size2MiB.bytes), file: nil)
      return
    }
    let file = try MemoryFile(name: "faultline-guest", length: length, pageSize: backing.pageSize)
    let mapping = try Mapping(of: file)
    self.init(backing: backing, mapping: mapping, file: file)
  }

  /// A guest_memfd that its machine made with the flags MMAP and INIT_SHARED; all of it is
  /// mapped.
  ///
  /// - Parameter length: of the guest_memfd in bytes.
  public init(guestMemfd: consuming OwnedDescriptor, length: Int) throws(Errno) {
    let file = MemoryFile(adopting: guestMemfd, length: length)
    let mapping = try Mapping(of: file)
    self.init(backing: .guestMemfd, mapping: mapping, file: file)
  }

  /// A clone's private mapping of clean pages that others have too (`SharedPageCache`); it has
  /// no object of its own behind it.
  ///
  /// - Parameter pageSize: of the object that it maps.
  public init(cloneMapping mapping: consuming Mapping, pageSize: PageSize) {
    self.init(
      backing: pageSize == .size4KiB ? .memfd : .hugetlb(pageSize), mapping: mapping, file: nil)
  }

  /// Private memory of huge pages, each of which the kernel takes from the pool when it is
  /// touched (MAP_NORESERVE), as Firecracker has it: a touch of an empty pool raises SIGBUS.
  ///
  /// - Parameter length: bytes, a multiple of the page size.
  public init(unreservedHugePages length: Int, pageSize: PageSize) throws(Errno) {
    let mapping = try Mapping(anonymousHugePages: length, pageSize: pageSize, reserved: false)
    self.init(backing: .hugetlb(pageSize), mapping: mapping, file: nil)
  }

  /// A memory object that somebody else made, mapped whole and shared.
  ///
  /// - Parameter reserved: see `Mapping.init(of:offset:length:sharing:writable:reserved:)`.
  public init(sharing file: consuming MemoryFile, reserved: Bool) throws(Errno) {
    let mapping = try Mapping(
      of: file.descriptor, length: file.length, sharing: .shared, reserved: reserved)
    let pageSize = file.pageSize
    self.init(
      backing: pageSize == .size4KiB ? .memfd : .hugetlb(pageSize), mapping: mapping, file: file)
  }

  private init(
    backing: MemoryBacking, mapping: consuming Mapping, file: consuming MemoryFile?
  ) {
    self.backing = backing
    self.mapping = mapping
    self.file = file
  }

  /// A way into the page cache beside the mapping; `invalidArgument` for anonymous
  /// memory, which has none.
  public borrowing func makePageCacheWriter() throws(Errno) -> PageCacheWriter {
    switch file {
    case .none: throw .invalidArgument
    case .some(let file): try PageCacheWriter(file)
    }
  }

  /// Where the guest's memory lies in this process.
  public var range: HostRange { mapping.range }
}
