// SPDX-License-Identifier: Apache-2.0

internal import CLinux
public import SystemPackage

/// Memory with a descriptor: a memfd on tmpfs or hugetlbfs (memfd_create(2)), or an object
/// that somebody else made.
public struct MemoryFile: ~Copyable, Sendable {
  /// The object.
  public let descriptor: OwnedDescriptor
  /// Bytes.
  public let length: Int
  /// 4 KiB for tmpfs, else the huge page size.
  public let pageSize: PageSize

  /// A new object of zero bytes; nothing is allocated yet.
  ///
  /// - Parameters:
  ///   - name: shown in /proc/PID/maps.
  ///   - length: bytes; a multiple of `pageSize`.
  ///   - pageSize: 4 KiB gives tmpfs, a larger size hugetlbfs.
  public init(name: String, length: Int, pageSize: PageSize = .size4KiB) throws(Errno) {
    guard length > 0, pageSize.divides(length) else { throw .invalidArgument }
    var flags = MFD_CLOEXEC
    if pageSize != .size4KiB {
      flags |= MFD_HUGETLB | UInt32(pageSize.rawValue.trailingZeroBitCount) << 26
    }
    let made = unsafe clinux_memfd_create(name, flags | MFD_ALLOW_SEALING)
    let descriptor = OwnedDescriptor(owning: CInt(try check(made)))
    _ = try check(clinux_ftruncate(descriptor.rawValue, off_t(length)))
    self.descriptor = descriptor
    self.length = length
    self.pageSize = pageSize
  }

  /// Fixes its length for good (F_SEAL_GROW, F_SEAL_SHRINK, F_SEAL_SEAL; memfd_create(2)).
  ///
  /// - Parameter futureWrites: also forbids writing through descriptors, and through mappings
  ///   that are made after this; and freeing pages (F_SEAL_FUTURE_WRITE).
  public borrowing func seal(futureWrites: Bool) throws(Errno) {
    // From <linux/fcntl.h>: SEAL 1, SHRINK 2, GROW 4, FUTURE_WRITE 16.
    _ = try check(clinux_add_seals(descriptor.rawValue, futureWrites ? 0x17 : 0x07))
  }

  /// Leaves only its owner, and who may override permissions, able to open it anew through /proc:
  /// mode 0600. A new object has 0777 (mm/shmem.c, fs/hugetlbfs/inode.c).
  public borrowing func restrictToOwner() throws(Errno) {
    _ = try check(clinux_fchmod(descriptor.rawValue, 0o600))
  }

  /// Takes over an object, such as a guest_memfd.
  ///
  /// - Parameters:
  ///   - length: of the object in bytes; a multiple of its page size.
  ///   - pageSize: of the object.
  public init(
    adopting descriptor: consuming OwnedDescriptor, length: Int, pageSize: PageSize = .size4KiB
  ) {
    self.descriptor = descriptor
    self.length = length
    self.pageSize = pageSize
  }

  /// Frees the pages of a range; they read as zero afterwards. No userfaultfd
  /// event is raised (unlike MADV_REMOVE).
  public borrowing func punchHole(offset: Int, length: Int) throws(Errno) {
    try descriptor.punchHole(offset: offset, length: length)
  }
}
