// SPDX-License-Identifier: Apache-2.0

package import Pager
import Synchronization

/// What `PatternSource` has, from storage in a bad state: late, in pieces, and not always.
package final class UnsteadySource: PageSource {
  /// In what ways it is unsteady; by itself in none.
  package struct Habits: Sendable {
    /// A read takes up to so many microseconds; most take much less.
    package var longestDelay = 0
    /// Answers with less than it could.
    package var givesShortRuns = false
    /// Of 100 questions for what is at hand, how many it answers.
    package var atHandPercent = 100
    /// Blocks without right content, for good.
    package var damagedBlocks: Set<Int> = []
    /// Blocks that are out of reach for so many reads.
    package var refusals: [Int: Int] = [:]

    package init() {}
  }

  private struct State {
    var random: SeededRandom
    var refusals: [Int: Int]
  }

  private let habits: Habits
  private let pattern: PatternSource
  private let state: Mutex<State>

  package init(_ habits: Habits, seed: UInt64) {
    self.habits = habits
    pattern = PatternSource(damagedBlocks: habits.damagedBlocks)
    state = Mutex(State(random: SeededRandom(seed: seed), refusals: habits.refusals))
  }

  /// What every word of a block is.
  package static func expected(block: Int) -> UInt64 { PatternSource.word(block: block, seed: 7) }

  @unsafe package func read(
    region: Int, offset: Int, length: Int, into buffer: UnsafeMutableRawPointer
  ) throws(PageSourceError) -> SourceRun {
    let first = offset / 4096
    let (delay, blocks, isRefused) = state.withLock { state in
      answer(&state, first, length / 4096)
    }
    if delay > 0 { Delay.microseconds(UInt32(delay)) }
    if isRefused { throw PageSourceError("block \(first) is out of reach", mayRecover: true) }
    // SAFETY: as the caller vouches, for no more than it asked.
    return try unsafe pattern.read(
      region: region, offset: offset, length: blocks * 4096, into: buffer)
  }

  @unsafe package func readAtHand(
    region: Int, offset: Int, length: Int, into buffer: UnsafeMutableRawPointer
  ) throws(PageSourceError) -> SourceRun? {
    guard state.withLock({ $0.random.below(100) < habits.atHandPercent }) else { return nil }
    // SAFETY: as the caller vouches.
    return try unsafe read(region: region, offset: offset, length: length, into: buffer)
  }

  /// How long a read takes, how many blocks it may bring, and whether it fails.
  private func answer(
    _ state: inout State, _ first: Int, _ limit: Int
  ) -> (delay: Int, blocks: Int, isRefused: Bool) {
    var delay = 0
    if habits.longestDelay > 0 {
      delay = state.random.below(habits.longestDelay) >> (state.random.below(4) * 2)
    }
    var blocks = limit
    if habits.givesShortRuns, state.random.below(2) == 0 { blocks = 1 + state.random.below(limit) }
    if let left = state.refusals[first], left > 0 {
      state.refusals[first] = left - 1
      return (delay, blocks, true)
    }
    let reached = (first + 1..<first + blocks).first { state.refusals[$0, default: 0] > 0 }
    return (delay, (reached ?? first + blocks) - first, false)
  }
}
