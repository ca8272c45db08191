// SPDX-License-Identifier: Apache-2.0

internal import CGuestProgram

/// One `struct cguest_workload`: what one vCPU gets in one piece.
struct WorkloadItem: Sendable {
  var raw: cguest_workload

  /// Positions of one batch: a thread cannot be stopped within one. Takes a fraction of a
  /// second at most, or as long as the pager needs for that many pages.
  static let largestBatch: UInt64 = 1 << 24

  static let byteCount = Int(CGUEST_WORKLOAD_SIZE)

  init(command: CInt, seed: UInt64, pages: Range<Int>, batch: Int) {
    raw = cguest_workload()
    raw.command = UInt64(command)
    raw.seed = seed
    raw.first = UInt64(pages.lowerBound)
    raw.count = UInt64(pages.count)
    raw.limit = raw.count
    raw.batch = UInt64(batch)
    raw.first_wrong = .max
    setOrder(.sequential)
  }

  mutating func setOrder(_ order: PageOrder) {
    // The smallest 2^n - 1 that holds all positions.
    let bits = raw.count <= 1 ? 0 : 64 - (raw.count - 1).leadingZeroBitCount
    raw.mask = (1 << UInt64(bits)) - 1
    raw.shift = UInt64(max(1, (bits + 1) / 2))
    switch order {
    case .sequential: raw.order = UInt64(CGUEST_ORDER_SEQUENTIAL)
    case .random: raw.order = UInt64(CGUEST_ORDER_PERMUTATION)
    case .zipf(let touches):
      raw.order = UInt64(CGUEST_ORDER_ZIPF)
      raw.limit = raw.count == 0 ? 0 : UInt64(touches)
      raw.random = (raw.seed &+ raw.first) | 1
    }
  }

  /// The structure's bytes, as the guest reads them.
  var bytes: [UInt8] { unsafe withUnsafeBytes(of: raw) { unsafe Array($0) } }

  /// `nil` when there are too few bytes.
  init?(bytes: ArraySlice<UInt8>) {
    guard bytes.count == Self.byteCount else { return nil }
    raw = cguest_workload()
    // SAFETY: the structure has only integers, any bytes are a value of it.
    unsafe withUnsafeMutableBytes(of: &raw) { unsafe $0.copyBytes(from: bytes) }
  }

  /// The end of what a timed touch of a KVM guest writes of the sample buffer, in bytes;
  /// 0 for others and for what does not fit it.
  var sampleEnd: UInt64 {
    let base = UInt64(CGUEST_SAMPLE_BASE)
    let most = UInt64(GuestLayout.gibibyte)
    guard (base..<base + most).contains(raw.samples), raw.limit <= most / 4 else { return 0 }
    return min(raw.samples - base + raw.limit * 4, most)
  }
}

/// What came of one item.
struct WorkloadResult: Sendable {
  var command: UInt64
  var first, count, position, generation, visited, wrong, firstWrong, value: UInt64

  init(_ item: WorkloadItem) {
    let raw = item.raw
    command = raw.command
    (first, count, position) = (raw.first, raw.count, raw.position)
    (generation, visited, value) = (raw.generation, raw.visited, raw.value)
    (wrong, firstWrong) = (raw.wrong, raw.first_wrong)
  }

  static let wordCount = 9

  var words: [UInt64] {
    [command, first, count, position, generation, visited, wrong, firstWrong, value]
  }

  init(words: [UInt64]) {
    (command, first, count) = (words[0], words[1], words[2])
    (position, generation, visited) = (words[3], words[4], words[5])
    (wrong, firstWrong, value) = (words[6], words[7], words[8])
  }
}
