// SPDX-License-Identifier: Apache-2.0

internal import CLinux

/// CLOCK_MONOTONIC and the time-stamp counter, without allocation.
public enum MonotonicClock {
  /// Nanoseconds since an arbitrary point.
  public static var nanoseconds: UInt64 { clinux_monotonic_nanoseconds() }

  /// Ticks of the processor's time-stamp counter (RDTSC).
  public static var ticks: UInt64 { clinux_rdtsc() }

  /// Ticks per nanosecond, measured over `milliseconds`.
  public static func ticksPerNanosecond(measuredOver milliseconds: UInt64 = 20) -> Double {
    let (start, first) = (nanoseconds, ticks)
    while nanoseconds - start < milliseconds * 1_000_000 {}
    let (end, last) = (nanoseconds, ticks)
    return Double(last - first) / Double(end - start)
  }
}
