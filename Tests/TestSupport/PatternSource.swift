// SPDX-License-Identifier: Apache-2.0

package import Pager
import Synchronization

/// A source whose content follows from the position: every eighth 4 KiB block is zero,
/// the others hold their own number and a seed in every word.
package final class PatternSource: PageSource {
  /// Distinguishes sources.
  package let seed: UInt64
  /// Blocks without right content.
  package let damagedBlocks: Set<Int>
  /// Sleeps before every read, in microseconds.
  package let delay: UInt32
  /// Blocks read so far.
  package var readCount: Int { reads.load(ordering: .relaxed) }
  private let reads = Atomic<Int>(0)

  package init(seed: UInt64 = 7, damagedBlocks: Set<Int> = [], delay: UInt32 = 0) {
    self.seed = seed
    self.damagedBlocks = damagedBlocks
    self.delay = delay
  }

  /// What the first word of a block is; 0 for zero blocks.
  package static func word(block: Int, seed: UInt64) -> UInt64 {
    block % 8 == 7 ? 0 : UInt64(block + 1) &* 0x9E37_79B9_7F4A_7C15 ^ seed
  }

  package func expected(block: Int) -> UInt64 { Self.word(block: block, seed: seed) }

  @unsafe package func read(
    region: Int, offset: Int, length: Int, into buffer: UnsafeMutableRawPointer
  ) throws(PageSourceError) -> SourceRun {
    if delay > 0 { Delay.microseconds(delay) }
    reads.wrappingAdd(1, ordering: .relaxed)
    let first = offset / 4096
    if damagedBlocks.contains(first) { throw PageSourceError("block \(first) is damaged") }
    let isZero = expected(block: first) == 0
    var count = 0
    while count < length / 4096, !damagedBlocks.contains(first + count),
      (expected(block: first + count) == 0) == isZero
    {
      if !isZero {
        unsafe (buffer + count * 4096).initializeMemory(
          as: UInt64.self, repeating: expected(block: first + count), count: 512)
      }
      count += 1
    }
    return SourceRun(isZero: isZero, length: count * 4096)
  }

  /// Without a delay everything is at hand.
  @unsafe package func readAtHand(
    region: Int, offset: Int, length: Int, into buffer: UnsafeMutableRawPointer
  ) throws(PageSourceError) -> SourceRun? {
    guard delay == 0 else { return nil }
    return try unsafe read(region: region, offset: offset, length: length, into: buffer)
  }
}
