// SPDX-License-Identifier: Apache-2.0

/// A set of pages: one bit for each 4 KiB page of tracked memory, whatever the size of the
/// pages that back it.
///
/// 32 KiB for each GiB. Page n is bit n mod 64 of word n / 64.
public struct DirtyBitmap: Hashable, Sendable {
  /// Pages that it has bits for.
  public let pageCount: Int
  /// The bits; those beyond `pageCount` are 0.
  public private(set) var words: [UInt64]

  /// No page is set.
  public init(pageCount: Int) {
    precondition(pageCount >= 0)
    self.pageCount = pageCount
    words = Array(repeating: 0, count: (pageCount + 63) / 64)
  }

  /// Every page is set.
  public init(all pageCount: Int) {
    self.init(pageCount: pageCount)
    insert(0..<pageCount)
  }

  /// Whether a page is set.
  public subscript(page: Int) -> Bool {
    precondition(page >= 0 && page < pageCount)
    return words[page >> 6] & (1 << UInt64(page & 63)) != 0
  }

  /// How many pages are set.
  public var count: Int { words.reduce(0) { $0 + $1.nonzeroBitCount } }

  /// Whether no page is set.
  public var isEmpty: Bool { words.allSatisfy { $0 == 0 } }

  // MARK: - Changes

  /// Sets a page.
  public mutating func insert(_ page: Int) {
    precondition(page >= 0 && page < pageCount)
    words[page >> 6] |= 1 << UInt64(page & 63)
  }

  /// Sets a range of pages.
  public mutating func insert(_ pages: Range<Int>) {
    precondition(pages.lowerBound >= 0 && pages.upperBound <= pageCount)
    forEachWordMask(in: pages) { words[$0] |= $1 }
  }

  /// Sets those of 64 pages whose bits are set; pages beyond the end are left out.
  ///
  /// - Parameter page: the page of bit 0; any number.
  public mutating func insert(word: UInt64, at page: Int) {
    precondition(page >= 0)
    guard word != 0, page < pageCount else { return }
    let room = pageCount - page
    let word = room < 64 ? word & ((1 << UInt64(room)) - 1) : word
    let (index, shift) = (page >> 6, UInt64(page & 63))
    words[index] |= word << shift
    if shift > 0, word >> (64 - shift) != 0 { words[index + 1] |= word >> (64 - shift) }
  }

  /// Clears a range of pages.
  public mutating func remove(_ pages: Range<Int>) {
    precondition(pages.lowerBound >= 0 && pages.upperBound <= pageCount)
    forEachWordMask(in: pages) { words[$0] &= ~$1 }
  }

  /// Clears all pages; keeps the room.
  public mutating func removeAll() {
    for index in words.indices { words[index] = 0 }
  }

  /// Adds the pages of another set of the same size.
  public mutating func formUnion(_ other: DirtyBitmap) {
    precondition(pageCount == other.pageCount)
    for index in words.indices { words[index] |= other.words[index] }
  }

  /// Keeps the pages that are also in another set of the same size.
  public mutating func formIntersection(_ other: DirtyBitmap) {
    precondition(pageCount == other.pageCount)
    for index in words.indices { words[index] &= other.words[index] }
  }

  /// Takes the pages of another set of the same size away.
  public mutating func subtract(_ other: DirtyBitmap) {
    precondition(pageCount == other.pageCount)
    for index in words.indices { words[index] &= ~other.words[index] }
  }

  // MARK: - Looking

  /// The pages of one of the sets or of both.
  public func union(_ other: DirtyBitmap) -> DirtyBitmap {
    var result = self
    result.formUnion(other)
    return result
  }

  /// How many pages of a range are set.
  public func count(in pages: Range<Int>) -> Int {
    var count = 0
    forEachWordMask(in: pages) { count += (words[$0] & $1).nonzeroBitCount }
    return count
  }

  /// 64 pages from any page on, as bits; 0 beyond the end.
  public func word(at page: Int) -> UInt64 {
    precondition(page >= 0)
    guard page < pageCount else { return 0 }
    let (index, shift) = (page >> 6, UInt64(page & 63))
    guard shift > 0 else { return words[index] }
    let upper = index + 1 < words.count ? words[index + 1] << (64 - shift) : 0
    return words[index] >> shift | upper
  }

  /// The runs of pages that are set, in order; none touches the next.
  public var ranges: PageRanges { ranges(in: 0..<pageCount) }

  /// The same within a range of pages.
  public func ranges(in pages: Range<Int>) -> PageRanges {
    precondition(pages.lowerBound >= 0 && pages.upperBound <= pageCount)
    return PageRanges(words: words, position: pages.lowerBound, end: pages.upperBound)
  }

  /// Runs of pages, found a word at a time.
  public struct PageRanges: Sequence, IteratorProtocol, Sendable {
    let words: [UInt64]
    var position: Int
    let end: Int

    /// The next run.
    public mutating func next() -> Range<Int>? {
      let first = find(from: position, inverted: false)
      guard first < end else {
        position = end
        return nil
      }
      position = find(from: first, inverted: true)
      return first..<position
    }

    /// The first page from `page` on that is set, or with `inverted` is not; else `end`.
    private func find(from page: Int, inverted: Bool) -> Int {
      var page = page
      while page < end {
        let word = inverted ? ~words[page >> 6] : words[page >> 6]
        let rest = word >> UInt64(page & 63)
        if rest != 0 { return Swift.min(page + rest.trailingZeroBitCount, end) }
        page = (page | 63) + 1
      }
      return end
    }
  }
}

/// Calls `body` with the index of each word that holds some of the pages, and their bits.
@inline(__always)
func forEachWordMask(in pages: Range<Int>, _ body: (_ index: Int, _ mask: UInt64) -> Void) {
  var page = pages.lowerBound
  while page < pages.upperBound {
    let end = Swift.min((page | 63) + 1, pages.upperBound)
    let ones = end - page == 64 ? UInt64.max : (1 << UInt64(end - page)) - 1
    body(page >> 6, ones << UInt64(page & 63))
    page = end
  }
}
