// SPDX-License-Identifier: Apache-2.0

internal import CLinux

/// The C library's heap, which keeps what was freed.
public enum Heap {
  /// Gives whole free pages back to the system (malloc_trim(3)): for a process that lives on
  /// after something that took much. Takes each arena's lock for a while; not for the hot path.
  public static func trim() { clinux_heap_trim() }
}
