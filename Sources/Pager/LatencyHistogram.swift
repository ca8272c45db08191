// SPDX-License-Identifier: Apache-2.0

internal import LinuxSystem
internal import Synchronization

/// A histogram of durations with a resolution of 1/16: written by one thread without
/// locks or allocation, read by any.
@safe
struct AtomicHistogram: ~Copyable, @unchecked Sendable {
  // SAFETY: the buckets are atomics at a stable address from init to deinit.
  static let bucketCount = 64 * 16
  private let buckets: UnsafeMutablePointer<Atomic<UInt64>>

  init() {
    unsafe buckets = .allocate(capacity: Self.bucketCount)
    for index in 0..<Self.bucketCount {
      unsafe (buckets + index).initialize(to: Atomic(0))
    }
  }

  deinit {
    unsafe buckets.deinitialize(count: Self.bucketCount)
    unsafe buckets.deallocate()
  }

  /// Adds a duration. Only the owning thread may call it.
  borrowing func record(_ nanoseconds: UInt64) {
    let index = Self.bucket(of: nanoseconds)
    let value = unsafe buckets[index].load(ordering: .relaxed)
    unsafe buckets[index].store(value &+ 1, ordering: .relaxed)
  }

  borrowing func add(to histogram: inout LatencyHistogram) {
    for index in 0..<Self.bucketCount {
      histogram.counts[index] += unsafe buckets[index].load(ordering: .relaxed)
    }
  }

  /// Values below 16 have a bucket each; above, the top five bits name the bucket.
  static func bucket(of value: UInt64) -> Int {
    guard value >= 16 else { return Int(value) }
    let exponent = 63 - value.leadingZeroBitCount
    let mantissa = Int(value >> UInt64(exponent - 4)) & 15
    return (exponent - 3) * 16 + mantissa
  }

  /// The smallest value of a bucket.
  static func lowerBound(of bucket: Int) -> UInt64 {
    guard bucket >= 16 else { return UInt64(bucket) }
    let exponent = bucket / 16 + 3
    return (16 + UInt64(bucket % 16)) << UInt64(exponent - 4)
  }
}

/// How long faults took, in nanoseconds.
public struct LatencyHistogram: Sendable {
  var counts = [UInt64](repeating: 0, count: AtomicHistogram.bucketCount)

  /// An empty histogram.
  public init() {}

  /// How many durations were recorded.
  public var count: UInt64 { counts.reduce(0, +) }

  /// Adds a duration.
  public mutating func record(_ nanoseconds: UInt64) {
    counts[AtomicHistogram.bucket(of: nanoseconds)] += 1
  }

  /// How many durations lie below one, in nanoseconds, within 1/16.
  public func count(below nanoseconds: UInt64) -> UInt64 {
    counts[..<AtomicHistogram.bucket(of: nanoseconds)].reduce(0, +)
  }

  /// The sum of all durations, in nanoseconds, within 1/16.
  public var sum: UInt64 {
    counts.enumerated().reduce(0) { sum, entry in
      sum + entry.element * AtomicHistogram.lowerBound(of: entry.offset)
    }
  }

  /// Adds the durations of another histogram.
  public mutating func add(_ other: LatencyHistogram) {
    for (index, count) in other.counts.enumerated() { counts[index] += count }
  }

  /// The duration below which the given part (0…1) of all lies, in nanoseconds, within
  /// 1/16; `nil` when nothing was recorded.
  public func quantile(_ part: Double) -> UInt64? {
    let total = count
    guard total > 0 else { return nil }
    let rank = UInt64((Double(total) * part).rounded(.up))
    var seen: UInt64 = 0
    for (bucket, entries) in counts.enumerated() where entries > 0 {
      seen += entries
      if seen >= max(rank, 1) { return AtomicHistogram.lowerBound(of: bucket) }
    }
    return nil
  }
}
