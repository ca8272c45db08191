// SPDX-License-Identifier: Apache-2.0

internal import CLinux
public import SystemPackage

/// Which pages of this process's memory exist or were written (PAGEMAP_SCAN on
/// /proc/self/pagemap, Linux 6.7; Documentation/admin-guide/mm/pagemap.rst).
public struct PageMap: ~Copyable, Sendable {
  let descriptor: OwnedDescriptor

  /// Opens /proc/self/pagemap.
  public init() throws(Errno) {
    let opened = unsafe clinux_openat(AT_FDCWD, "/proc/self/pagemap", O_RDONLY | O_CLOEXEC, 0)
    descriptor = OwnedDescriptor(owning: CInt(try check(opened)))
  }

  /// The parts of a range that are in memory, swapped out or poisoned, in order. Everything
  /// else of anonymous memory reads as zero.
  ///
  /// Absent pages that are write-protected by userfaultfd count as populated: their entry, a
  /// marker (mm/swapops.h), cannot be told from that of a page that is just being migrated.
  ///
  /// `inappropriateIOCTLForDevice` before Linux 6.7.
  public borrowing func populatedRanges(in range: HostRange) throws(Errno) -> [HostRange] {
    var found: [HostRange] = []
    var vector = [page_region](repeating: page_region(), count: 512)
    var start = range.start.rawValue
    while start < range.end.rawValue {
      var argument = pm_scan_arg()
      argument.size = UInt64(MemoryLayout<pm_scan_arg>.size)
      argument.start = start
      argument.end = range.end.rawValue
      argument.vec_len = UInt64(vector.count)
      argument.category_anyof_mask = UInt64(PAGE_IS_PRESENT | PAGE_IS_SWAPPED)
      argument.return_mask = argument.category_anyof_mask
      let number = descriptor.rawValue
      let count = try unsafe vector.withUnsafeMutableBufferPointer { room throws(Errno) in
        argument.vec = UInt64(UInt(bitPattern: room.baseAddress))
        return try check(unsafe clinux_pagemap_scan(number, &argument))
      }
      for region in vector[..<count] {
        let first = HostAddress(region.start)
        if let last = found.last, last.end == first {
          found[found.count - 1].length += first.distance(to: HostAddress(region.end))
        } else {
          found.append(
            HostRange(start: first, length: first.distance(to: HostAddress(region.end))))
        }
      }
      guard argument.walk_end > start else { throw .ioError }
      start = argument.walk_end
    }
    return found
  }
}
