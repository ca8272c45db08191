// SPDX-License-Identifier: Apache-2.0

import GuestMemory
import LinuxSystem
import Pager
import TestSupport
import Testing
import Userfault

@Suite("Several sources are one")
struct CompositeSourceTests {
  /// Sources that meet inside of huge pages and of what a fault brings along.
  private struct Layout {
    let first = PatternSource(seed: 1)
    let second = PatternSource(seed: 2)
    let blocks: Int

    var firstEnd: Int { blocks / 3 | 1 }
    var secondStart: Int { firstEnd + 5 }

    func source() throws -> CompositeSource {
      // Not in order, and the first from within its region.
      try CompositeSource(regions: [
        [
          .init(secondStart * 4096..<blocks * 4096, from: second),
          .init(0..<firstEnd * 4096, from: first, offset: 11 * 4096),
          .init(firstEnd * 4096..<secondStart * 4096, from: ZeroSource()),
        ]
      ])
    }

    func expected(block: Int) -> UInt64 {
      if block < firstEnd { return first.expected(block: block + 11) }
      return block < secondStart ? 0 : second.expected(block: block - secondStart)
    }
  }

  @Test("Every page is that of its part, also where a page has several parts", arguments: cases)
  func content(kind: MemoryCase) throws {
    let pages = kind.pages(64)
    let memory = try GuestMemoryObject(
      backing: kind.backing, length: pages * kind.backing.pageSize.bytes)
    let layout = Layout(blocks: memory.range.length / 4096)
    let session = try PagerSession(
      userfaultfd: try Userfaultfd(wanting: PagerSession<CompositeSource>.features.wanted),
      regions: [try PagedRegion(memory, mode: kind.mode)], source: try layout.source())
    try session.start()
    defer { session.release() }
    for step in 0..<layout.blocks {
      let block = step * 37 % layout.blocks
      for offset in [0, 4088] {
        #expect(load(memory.range, offset: block * 4096 + offset) == layout.expected(block: block))
      }
    }
    #expect(session.statistics.failedPages == 0)
  }

  @Test("What no part covers is an error, never zero", arguments: [(0, 4), (0, 9), (1, 0), (2, 0)])
  func gaps(region: Int, block: Int) throws {
    let source = try CompositeSource(regions: [
      [.init(0..<4 * 4096, from: ZeroSource()), .init(5 * 4096..<9 * 4096, from: ZeroSource())], [],
    ])
    let mapping = try Mapping(anonymous: 4096)
    // SAFETY: there is room for a page, which is what is asked for.
    #expect(throws: PageSourceError.self) {
      try unsafe source.read(
        region: region, offset: block * 4096, length: 4096, into: mapping.pointer)
    }
    let run = try unsafe source.read(
      region: 0, offset: 3 * 4096, length: 4096, into: mapping.pointer)
    #expect((run.isZero, run.length) == (true, 4096))
  }

  @Test(
    "Parts that overlap, are empty or are not whole pages are refused",
    arguments: [
      [0..<8192, 4096..<12288], [0..<8192, 0..<8192], [4096..<4096], [0..<100], [1..<4096],
      [-4096..<4096],
    ])
  func refusals(ranges: [Range<Int>]) {
    #expect(throws: PageSourceError.self) {
      try CompositeSource(regions: [ranges.map { .init($0, from: ZeroSource()) }])
    }
  }
}
