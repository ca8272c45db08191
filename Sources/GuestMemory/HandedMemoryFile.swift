// SPDX-License-Identifier: Apache-2.0

public import LinuxSystem
public import SystemPackage

/// A memory file of another process, whose page cache is filled from here.
///
/// That process can do to its file what it likes, also while it is filled: it is an error here
/// then, and never a SIGBUS. tmpfs is written by pwrite(2), so nothing of it is mapped. hugetlbfs
/// has no write(2): its pages are allocated, then copied through a mapping by the kernel, for
/// which a page that was taken out in between is EFAULT.
public final class HandedMemoryFile: Sendable {
  /// The unit of its page cache.
  public let pageSize: PageSize
  private let descriptor: OwnedDescriptor
  /// With hugetlbfs: what is used of it.
  private let alias: Mapping?
  private let aliasStart: Int

  /// Takes a file over. That it is a memory file, of this page size and long enough, is for the
  /// caller to check.
  ///
  /// It is opened anew, so that its owner cannot change how it is written to: with O_APPEND on the
  /// open file that both have, pwrite(2) would put pages elsewhere. `permissionDenied` where its
  /// mode forbids that (memfd_create(2) gives 0777).
  ///
  /// - Parameter used: the bytes that will be written; whole pages.
  public init(
    _ received: consuming OwnedDescriptor, pageSize: PageSize, used: Range<Int>
  ) throws(Errno) {
    let descriptor = try OwnedDescriptor(
      openingForUpdate: FilePath("/proc/self/fd/\(received.rawValue)"))
    let alias: Mapping? =
      pageSize == .size4KiB
      ? nil
      // Not reserved: what the other process has set aside counts here, too.
      : try Mapping(
        of: descriptor, offset: used.lowerBound, length: used.count, sharing: .shared)
    self.alias = alias
    aliasStart = used.lowerBound
    self.descriptor = descriptor
    self.pageSize = pageSize
  }

  /// Puts whole pages into the page cache; see `PageCacheWriter.write`.
  @unsafe
  func write(_ bytes: UnsafeRawBufferPointer, at offset: Int) throws(Errno) {
    switch alias {
    case .none:
      try unsafe descriptor.writeAll(bytes, at: offset)
    case .some(let alias):
      // `noSpace` where the pool is empty.
      try descriptor.allocate(offset: offset, length: bytes.count)
      precondition(offset >= aliasStart && offset - aliasStart + bytes.count <= alias.length)
      // SAFETY: the range lies inside of the alias.
      try unsafe GuardedCopy.write(
        bytes, to: alias.range.start.advanced(by: offset - aliasStart))
    }
  }

  /// Takes whole pages out of the page cache; see `PageCacheWriter.discard`.
  func discard(offset: Int, length: Int) throws(Errno) {
    try descriptor.punchHole(offset: offset, length: length)
  }
}
