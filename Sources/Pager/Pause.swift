// SPDX-License-Identifier: Apache-2.0

#if canImport(Glibc)
  internal import Glibc
#else
  internal import Musl
#endif

/// Short waits of a fault thread.
enum Pause {
  static func yield() { sched_yield() }
  static func microseconds(_ count: UInt32) { usleep(count) }
}
