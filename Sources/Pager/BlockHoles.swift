// SPDX-License-Identifier: Apache-2.0

internal import LinuxSystem
internal import SystemPackage

/// Which 4 KiB blocks of pages that are not filled yet the guest gave up, where pages are larger:
/// an event is of 4 KiB and more, and the rest of the page keeps its content.
///
/// One bit a block, 32 KiB for each GiB where all of it is used; none before. Whoever adds to it
/// holds the session's gate alone, whoever looks holds it with others.
@safe
final class BlockHoles: @unchecked Sendable {
  // SAFETY: see above: no reader meets a writer. The mapping lives as long as the holes.
  private let storage: Mapping
  private let words: UnsafeMutablePointer<UInt64>
  private let blocksInPage: Int
  private var isEmpty = true

  init(pages: Int, pageSize: PageSize) throws(Errno) {
    blocksInPage = pageSize.bytes / 4096
    // A page has at least 512 blocks, so whole words.
    storage = try Mapping(anonymous: (pages * blocksInPage / 8 + 4095) & ~4095)
    // SAFETY: anonymous memory is zero, and aligned to more than a word.
    unsafe words = storage.pointer.assumingMemoryBound(to: UInt64.self)
  }

  /// Notes blocks of a page, counted in it; returns whether all of the page is given up now.
  func add(_ blocks: Range<Int>, ofPage page: Int) -> Bool {
    isEmpty = false
    let first = page * blocksInPage
    for block in blocks.clamped(to: 0..<blocksInPage) {
      unsafe words[(first + block) >> 6] |= 1 << UInt64((first + block) & 63)
    }
    return (first >> 6..<(first + blocksInPage) >> 6).allSatisfy { unsafe words[$0] == .max }
  }

  /// Writes zeros over the blocks of some pages that were given up.
  @unsafe
  func clear(_ pages: Range<Int>, in bytes: UnsafeMutableRawPointer) {
    guard !isEmpty else { return }
    let first = pages.lowerBound * blocksInPage
    for word in first >> 6..<(pages.upperBound * blocksInPage) >> 6 {
      var rest = unsafe words[word]
      while rest != 0 {
        let block = word << 6 + rest.trailingZeroBitCount - first
        // SAFETY: the caller vouches for the bytes of all of the pages.
        unsafe (bytes + block * 4096).initializeMemory(as: UInt8.self, repeating: 0, count: 4096)
        rest &= rest &- 1
      }
    }
  }
}
