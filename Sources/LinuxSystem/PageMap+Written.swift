// SPDX-License-Identifier: Apache-2.0

internal import CLinux
public import SystemPackage

extension PageMap {
  /// Calls `body` with the pages of a range that were written since they were
  /// write-protected, and write-protects them again (PAGEMAP_SCAN with
  /// PM_SCAN_WP_MATCHING, Linux 6.7). Finding and protecting a page is one step under its
  /// table's lock, so no write between them is lost.
  ///
  /// The range must be registered with a userfaultfd in mode WP with WP_ASYNC;
  /// `notPermitted` where it is not. Pages that never were protected count as written, and
  /// so do those that vanished (MADV_DONTNEED of anonymous memory). Parts are reported in
  /// order, also when a later part fails.
  public borrowing func takeWritten(
    in range: HostRange, _ body: (HostRange) -> Void
  ) throws(Errno) {
    var vector = [page_region](repeating: page_region(), count: 512)
    var start = range.start.rawValue
    while start < range.end.rawValue {
      var argument = pm_scan_arg()
      argument.size = UInt64(MemoryLayout<pm_scan_arg>.size)
      argument.flags = UInt64(PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC)
      argument.start = start
      argument.end = range.end.rawValue
      argument.vec_len = UInt64(vector.count)
      // Exactly these masks are the kernel's fast path (fs/proc/task_mmu.c), which also
      // counts entries without anything in them as written.
      argument.category_mask = UInt64(PAGE_IS_WRITTEN)
      argument.return_mask = UInt64(PAGE_IS_WRITTEN)
      let number = descriptor.rawValue
      let count = try unsafe vector.withUnsafeMutableBufferPointer { room throws(Errno) in
        argument.vec = UInt64(UInt(bitPattern: room.baseAddress))
        return try retryingInterrupted { unsafe clinux_pagemap_scan(number, &argument) }
      }
      for region in vector[..<count] {
        let first = HostAddress(region.start)
        body(HostRange(start: first, length: first.distance(to: HostAddress(region.end))))
      }
      guard argument.walk_end > start else { throw .ioError }
      start = argument.walk_end
    }
  }
}
