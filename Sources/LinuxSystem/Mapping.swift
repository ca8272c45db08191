// SPDX-License-Identifier: Apache-2.0

internal import CLinux
public import SystemPackage

/// Whether stores to a mapping reach the object behind it (mmap(2)).
public enum MappingSharing: Sendable {
  /// MAP_SHARED: stores reach the object and its other mappings.
  case shared
  /// MAP_PRIVATE: stores are copied; the object stays as it is.
  case `private`
}

/// The one owner of a range of this process's address space; unmapped when it
/// goes away.
///
/// The bytes inside are live: guests, other mappings and the kernel write to them
/// at any time. Copy through pointers; never form an array or a span over them.
@safe
public struct Mapping: ~Copyable, @unchecked Sendable {
  // SAFETY: `Sendable` because the owner only hands out addresses; whoever turns
  // one into a pointer answers for the access.

  /// Where the range lies.
  public let range: HostRange

  /// The first byte, for code that copies in or out.
  ///
  /// Valid as long as this owner lives.
  @unsafe public var pointer: UnsafeMutableRawPointer {
    // SAFETY: mmap(2) succeeded, so the address is not null.
    unsafe UnsafeMutableRawPointer(bitPattern: UInt(range.start.rawValue)).unsafelyUnwrapped
  }

  /// Bytes.
  public var length: Int { range.length }

  /// Fresh zero pages: MAP_PRIVATE|MAP_ANONYMOUS|MAP_NORESERVE.
  ///
  /// - Parameters:
  ///   - length: bytes; a multiple of 4 KiB.
  ///   - alignment: bytes, a power of two, at least 4 KiB.
  ///   - transparentHugePages: `false` keeps the kernel from backing the range by
  ///     2 MiB pages, so that every 4 KiB page is a fault of its own.
  public init(
    anonymous length: Int, alignment: Int = 4096, transparentHugePages: Bool = false
  ) throws(Errno) {
    // Reserve room for the alignment first, then give the rest back.
    let slack = alignment > 4096 ? alignment : 0
    let flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE
    let reserved = try check(
      clinux_mmap(nil, length + slack, PROT_READ | PROT_WRITE, flags, -1, 0))
    let start = slack == 0 ? reserved : (reserved + alignment - 1) & ~(alignment - 1)
    if start > reserved { _ = clinux_munmap(UInt(reserved), start - reserved) }
    let tail = reserved + length + slack - (start + length)
    if tail > 0 { _ = clinux_munmap(UInt(start + length), tail) }
    if !transparentHugePages {
      // EINVAL where the kernel has no huge pages: then there is nothing to turn off.
      _ = clinux_madvise(UInt(start), length, MADV_NOHUGEPAGE)
    }
    range = HostRange(start: HostAddress(UInt64(start)), length: length)
  }

  /// Addresses that can neither be read nor written (PROT_NONE), as low as the kernel has them.
  public init(inaccessible length: Int) throws(Errno) {
    // A hint only: behind what vm.mmap_min_addr keeps free by default.
    let hint = unsafe UnsafeMutableRawPointer(bitPattern: 1 << 20)
    let flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE
    // SAFETY: without MAP_FIXED nothing that is mapped is touched.
    let start = try check(unsafe clinux_mmap(hint, length, PROT_NONE, flags, -1, 0))
    range = HostRange(start: HostAddress(UInt64(start)), length: length)
  }

  /// Anonymous memory backed by huge pages of the given size (MAP_HUGETLB).
  ///
  /// - Parameter reserved: `true` has the kernel set all pages aside now: `Errno.noMemory` when
  ///   the pool has too few. `false` (MAP_NORESERVE, as Firecracker has it) takes each when it is
  ///   touched, and a touch of an empty pool raises SIGBUS.
  public init(
    anonymousHugePages length: Int, pageSize: PageSize, reserved: Bool = true
  ) throws(Errno) {
    let order = CInt(pageSize.rawValue.trailingZeroBitCount) << 26  // MAP_HUGE_SHIFT
    let flags =
      MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB | order | (reserved ? 0 : MAP_NORESERVE)
    let start = try check(
      clinux_mmap(nil, length, PROT_READ | PROT_WRITE, flags, -1, 0))
    range = HostRange(start: HostAddress(UInt64(start)), length: length)
  }

  /// Maps part of a file or memory object.
  ///
  /// - Parameters:
  ///   - offset: bytes into the object; a multiple of its page size.
  ///   - length: bytes.
  ///   - reserved: `true` makes the kernel set memory aside now; on hugetlbfs the call
  ///     then fails (`noMemory`) where a later touch would raise SIGBUS.
  public init(
    of descriptor: borrowing OwnedDescriptor, offset: Int = 0, length: Int,
    sharing: MappingSharing, writable: Bool = true, reserved: Bool = false
  ) throws(Errno) {
    let protection = writable ? PROT_READ | PROT_WRITE : PROT_READ
    let flags = (sharing == .shared ? MAP_SHARED : MAP_PRIVATE) | (reserved ? 0 : MAP_NORESERVE)
    let start = try check(
      clinux_mmap(nil, length, protection, flags, descriptor.rawValue, off_t(offset)))
    range = HostRange(start: HostAddress(UInt64(start)), length: length)
  }

  /// Maps a whole memory object, shared; huge pages are reserved.
  public init(of file: borrowing MemoryFile, sharing: MappingSharing = .shared) throws(Errno) {
    try self.init(
      of: file.descriptor, length: file.length, sharing: sharing,
      reserved: file.pageSize != .size4KiB)
  }

  deinit { _ = clinux_munmap(UInt(range.start.rawValue), range.length) }

  /// madvise(2) on part of the mapping; offset and length in bytes.
  public borrowing func advise(_ advice: MemoryAdvice, offset: Int, length: Int) throws(Errno) {
    precondition(offset >= 0 && length >= 0 && offset + length <= range.length)
    let start = UInt(range.start.rawValue) + UInt(offset)
    _ = try retryingInterrupted { clinux_madvise(start, length, advice.rawValue) }
  }

  /// mincore(2): for each 4 KiB page whether it is mapped or, where the mapping has
  /// nothing yet, up to date in the page cache of its object.
  public borrowing func residentPages() throws(Errno) -> [Bool] {
    var bytes = [UInt8](repeating: 0, count: (length + 4095) / 4096)
    let start = UInt(range.start.rawValue)
    let result = unsafe bytes.withUnsafeMutableBufferPointer { bytes in
      // SAFETY: one byte for each page of the mapping.
      unsafe clinux_mincore(start, range.length, bytes.baseAddress)
    }
    _ = try check(result)
    return bytes.map { $0 & 1 == 1 }
  }

  /// Takes part of the mapping away, as munmap(2) does; for tests of events. The
  /// addresses stay reserved, so that nobody else's mapping lands inside of ours.
  package borrowing func punchOut(offset: Int, length: Int) throws(Errno) {
    precondition(offset >= 0 && length >= 0 && offset + length <= range.length)
    let start = unsafe pointer + offset
    let flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE
    // SAFETY: the range lies inside this mapping, whose pages are what is to go.
    _ = try check(unsafe clinux_mmap(start, length, PROT_NONE, flags, -1, 0))
  }
}

/// What madvise(2) is told.
public enum MemoryAdvice: Sendable {
  /// MADV_DONTNEED: drop this mapping's pages.
  case dontNeed
  /// MADV_REMOVE: punch a hole into the shared object behind the mapping.
  case remove
  /// MADV_POPULATE_READ: fault everything in for reading, without touching it.
  case populateRead
  /// MADV_POPULATE_WRITE: fault everything in for writing, without touching it.
  case populateWrite

  var rawValue: CInt {
    switch self {
    case .dontNeed: MADV_DONTNEED
    case .remove: MADV_REMOVE
    case .populateRead: MADV_POPULATE_READ
    case .populateWrite: MADV_POPULATE_WRITE
    }
  }
}
