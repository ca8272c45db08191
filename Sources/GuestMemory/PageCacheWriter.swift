// SPDX-License-Identifier: Apache-2.0

public import LinuxSystem
public import SystemPackage

/// Fills the page cache of a shared memory object without going through the mapping
/// that userfaultfd watches.
///
/// On tmpfs it is pwrite(2): no fault, and a full tmpfs is an error instead of a
/// SIGBUS. hugetlbfs has no write(2): there the pages are allocated first, then
/// copied through an alias mapping.
@safe
public struct PageCacheWriter: ~Copyable, Sendable {
  private let descriptor: OwnedDescriptor
  private let alias: Mapping?

  /// A writer of its own for the object; the descriptor is duplicated.
  public init(_ file: borrowing MemoryFile) throws(Errno) {
    let descriptor = try file.descriptor.duplicate()
    if file.pageSize == .size4KiB {
      self.init(descriptor: descriptor, alias: nil)
    } else {
      let alias = try Mapping(of: file)
      self.init(descriptor: descriptor, alias: alias)
    }
  }

  private init(descriptor: consuming OwnedDescriptor, alias: consuming Mapping?) {
    self.descriptor = descriptor
    self.alias = alias
  }

  /// Puts whole pages into the page cache. Nothing of it is visible through a mapping
  /// registered MINOR until UFFDIO_CONTINUE.
  ///
  /// After an error the pages may exist with any content: write them again before
  /// anyone is woken.
  /// - Parameters:
  ///   - bytes: whole pages of the object.
  ///   - offset: bytes into the object.
  @unsafe
  public borrowing func write(_ bytes: UnsafeRawBufferPointer, at offset: Int) throws(Errno) {
    guard let base = bytes.baseAddress else { return }
    switch alias {
    case .none:
      try unsafe descriptor.writeAll(bytes, at: offset)
    case .some(let alias):
      try descriptor.allocate(offset: offset, length: bytes.count)
      // SAFETY: allocate() made the pages, so the copy cannot raise SIGBUS; the range
      // lies inside the object, which the alias maps whole.
      precondition(offset >= 0 && offset + bytes.count <= alias.length)
      unsafe (alias.pointer + offset).copyMemory(from: base, byteCount: bytes.count)
    }
  }
}
