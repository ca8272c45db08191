// SPDX-License-Identifier: Apache-2.0

package import Pager

/// A source that asks a hook before each read, which may wait or throw. Nothing is at hand.
package struct HookedSource: PageSource {
  private let pattern = PatternSource()
  private let hook: @Sendable (_ block: Int) throws(PageSourceError) -> Void

  /// - Parameter hook: gets the first block of each read, on the thread that reads.
  package init(_ hook: @escaping @Sendable (_ block: Int) throws(PageSourceError) -> Void) {
    self.hook = hook
  }

  /// What the first word of a block is.
  package static func expected(block: Int) -> UInt64 { PatternSource.word(block: block, seed: 7) }

  @unsafe package func read(
    region: Int, offset: Int, length: Int, into buffer: UnsafeMutableRawPointer
  ) throws(PageSourceError) -> SourceRun {
    try hook(offset / 4096)
    // SAFETY: as the caller vouches.
    return try unsafe pattern.read(region: region, offset: offset, length: length, into: buffer)
  }
}
