// SPDX-License-Identifier: Apache-2.0

/// Numbers of 4 KiB blocks. Its size depends on how many there are, not on how high they go:
/// a bit for each block of a stretch of 4 MiB that has any.
public struct BlockSet: Sendable, Hashable {
  /// Blocks that have their bits together.
  static let group = PieceWork.pieceLength / ImageLimits.blockSize
  private static let wordsPerGroup = group / 64

  private var groups: [Int: [UInt64]] = [:]
  /// How many there are.
  public private(set) var count = 0

  /// No blocks.
  public init() {}

  /// Whether there are none.
  public var isEmpty: Bool { count == 0 }

  /// Whether a block is among them.
  public func contains(_ block: Int) -> Bool {
    guard block >= 0, let words = groups[block / Self.group] else { return false }
    return words[block % Self.group / 64] & 1 << UInt64(block % 64) != 0
  }

  /// How many there are in a range.
  public func count(in range: Range<Int>) -> Int {
    var count = 0
    var block = max(range.lowerBound, 0)
    while block < range.upperBound {
      let end = min((block / Self.group + 1) * Self.group, range.upperBound)
      if let words = groups[block / Self.group] {
        while block < end {
          let next = min((block / 64 + 1) * 64, end)
          // As many ones as blocks are asked for, in their place.
          let mask = (UInt64.max >> UInt64(64 - (next - block))) << UInt64(block % 64)
          count += (words[block % Self.group / 64] & mask).nonzeroBitCount
          block = next
        }
      }
      block = end
    }
    return count
  }

  /// The first blocks in a range that follow each other; `nil` when there are none.
  public func firstRun(in range: Range<Int>) -> Range<Int>? {
    guard let first = next(in: range, isMember: true) else { return nil }
    return first..<(next(in: first..<range.upperBound, isMember: false) ?? range.upperBound)
  }

  /// The first block in a range that is, or is not, among them.
  private func next(in range: Range<Int>, isMember: Bool) -> Int? {
    var block = max(range.lowerBound, 0)
    while block < range.upperBound {
      let end = min((block / Self.group + 1) * Self.group, range.upperBound)
      guard let words = groups[block / Self.group] else {
        if !isMember { return block }
        block = end
        continue
      }
      while block < end {
        let word = words[block % Self.group / 64]
        let rest = (isMember ? word : ~word) >> UInt64(block % 64)
        if rest != 0 {
          let found = block + rest.trailingZeroBitCount
          return found < range.upperBound ? found : nil
        }
        block = (block / 64 + 1) * 64
      }
    }
    return nil
  }

  /// Calls a body for each run of blocks that follow each other, in ascending order.
  public func forEachRange<Failure: Error>(
    _ body: (Range<Int>) throws(Failure) -> Void
  ) throws(Failure) {
    var run: Range<Int>?
    for group in groups.keys.sorted() {
      for (index, word) in (groups[group] ?? []).enumerated() {
        var rest = word
        let first = group * Self.group + index * 64
        while rest != 0 {
          let start = rest.trailingZeroBitCount
          let length = (~(rest >> UInt64(start))).trailingZeroBitCount
          rest &= length == 64 ? 0 : ~((1 << UInt64(length) - 1) << UInt64(start))
          if let open = run, open.upperBound == first + start {
            run = open.lowerBound..<open.upperBound + length
          } else {
            if let run { try body(run) }
            run = first + start..<first + start + length
          }
        }
      }
    }
    if let run { try body(run) }
  }

  // MARK: - Adding

  /// Adds a block.
  public mutating func insert(_ block: Int) { insert(block..<block + 1) }

  /// Adds blocks that follow each other.
  public mutating func insert(_ blocks: Range<Int>) {
    precondition(blocks.lowerBound >= 0)
    var block = blocks.lowerBound
    while block < blocks.upperBound {
      let group = block / Self.group
      let end = min((group + 1) * Self.group, blocks.upperBound)
      count += Self.set(
        block - group * Self.group..<end - group * Self.group,
        in: &groups[group, default: Array(repeating: 0, count: Self.wordsPerGroup)])
      block = end
    }
  }

  /// Sets bits of a group; how many were not set before.
  private static func set(_ bits: Range<Int>, in words: inout [UInt64]) -> Int {
    var added = 0
    var bit = bits.lowerBound
    while bit < bits.upperBound {
      let next = min((bit / 64 + 1) * 64, bits.upperBound)
      let mask = (UInt64.max >> UInt64(64 - (next - bit))) << UInt64(bit % 64)
      added += (mask & ~words[bit / 64]).nonzeroBitCount
      words[bit / 64] |= mask
      bit = next
    }
    return added
  }

  /// Adds blocks of another set.
  public mutating func formUnion(_ other: BlockSet) {
    for (group, words) in other.groups {
      guard var mine = groups[group] else {
        groups[group] = words
        count += words.reduce(0) { $0 + $1.nonzeroBitCount }
        continue
      }
      for index in mine.indices {
        count += (words[index] & ~mine[index]).nonzeroBitCount
        mine[index] |= words[index]
      }
      groups[group] = mine
    }
  }
}
