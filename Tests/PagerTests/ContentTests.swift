// SPDX-License-Identifier: Apache-2.0

import GuestMemory
import LinuxSystem
import Pager
import Synchronization
import SystemPackage
import TestSupport
import Testing
import Userfault

/// Whether a case can run here.
func available(_ kind: MemoryCase) -> Bool {
  kind.backing.pageSize == .size4KiB || Host.hasHugePages(8)
}

/// The cases of this machine; huge pages only where the pool has some.
let cases = MemoryCase.all.filter(available)

@Suite("What these tests cover")
struct CoverageTests {
  @Test(
    "2 MiB pages are among the cases",
    .enabled(if: Host.hasHugePages(8), "needs 8 free 2 MiB pages in /proc/sys/vm/nr_hugepages"))
  func hugePages() {
    #expect(cases.contains { $0.backing == .hugetlb(.size2MiB) })
  }
}

@Suite("Every page that arrives is the source's")
struct ContentTests {
  @Test("Concurrent touches from many threads read the right content", arguments: cases)
  func concurrentTouches(kind: MemoryCase) throws {
    let guest = try ServedMemory(kind, pages: kind.pages(512))
    let wrong = Atomic<Int>(0)
    let blocks = guest.blocks
    try inThreads(8) { thread in
      // Each thread in an order of its own; all of them read every block.
      let order = (0..<blocks).map { ($0 &* 5 &+ thread &* 61) % blocks }
      wrong.wrappingAdd(guest.wrongBlocks(order).count, ordering: .relaxed)
    }
    #expect(wrong.load(ordering: .relaxed) == 0)
    let statistics = guest.session.statistics
    #expect(statistics.failedPages == 0)
    // The last waiter can be awake before the last resolution is counted.
    #expect(
      Delay.until {
        let now = guest.session.statistics
        return now.copiedPages + now.continuedPages + now.zeroPages
          == UInt64(guest.region.pageCount)
      })
    switch kind.mode {
    case .missing: #expect(statistics.continuedPages == 0)
    case .minor: #expect(statistics.copiedPages == 0)
    }
  }

  @Test("Two threads that fault on one page both go on", arguments: cases)
  func twoThreadsOnePage(kind: MemoryCase) throws {
    for round in 0..<(kind.backing.pageSize == .size4KiB ? 50 : 5) {
      let guest = try ServedMemory(
        kind, pages: kind.pages(1), source: PatternSource(delay: round % 2 == 0 ? 500 : 0))
      let values = Mutex<[UInt64]>([])
      try inThreads(2) { _ in
        let value = load(guest.range, offset: 0)
        values.withLock { $0.append(value) }
      }
      #expect(values.withLock { $0 } == Array(repeating: guest.source.expected(block: 0), count: 2))
      #expect(guest.session.statistics.failedPages == 0)
    }
  }

  @Test(
    "A copy through the kernel waits for the pages, in each way", arguments: cases,
    GuardedCopy.Way.allCases)
  func guardedCopy(kind: MemoryCase, way: GuardedCopy.Way) throws {
    let guest = try ServedMemory(kind, pages: kind.pages(16))
    let start = guest.range.start
    let words = guest.blocks * 512
    var copy: [UInt64] = Array(repeating: 0, count: words)
    let count = try unsafe copy.withUnsafeMutableBytes { buffer throws(Errno) in
      // SAFETY: the buffer is the array's; the address is the guest's.
      try unsafe GuardedCopy.read(from: start, into: buffer, by: way)
    }
    #expect(count == words * 8)
    for block in 0..<guest.blocks {
      #expect(copy[block * 512] == guest.source.expected(block: block))
    }
  }

  @Test("What a guest writes stays, and the rest of the page is the source's", arguments: cases)
  func writes(kind: MemoryCase) throws {
    let guest = try ServedMemory(kind, pages: kind.pages(64))
    try inThreads(4) { thread in
      for block in stride(from: thread, to: guest.blocks, by: 4) {
        store(UInt64(block) | 1 << 40, guest.range, offset: block * 4096)
      }
    }
    for block in 0..<guest.blocks {
      #expect(load(guest.range, offset: block * 4096) == UInt64(block) | 1 << 40)
      #expect(load(guest.range, offset: block * 4096 + 8) == guest.source.expected(block: block))
    }
  }

  @Test("populate fills everything that has data, together with faults", arguments: cases)
  func populate(kind: MemoryCase) throws {
    let guest = try ServedMemory(kind, pages: kind.pages(2048))
    let wrong = Atomic<Int>(0)
    let toucher = try ThreadHandle.start {
      let order = stride(from: guest.blocks - 1, through: 0, by: -3)
      wrong.store(guest.wrongBlocks(order).count, ordering: .relaxed)
    }
    try guest.session.populate()
    toucher.join()
    #expect(wrong.load(ordering: .relaxed) == 0)
    // Stopped: nothing serves any more, so data pages must all be there already.
    guest.session.stop()
    let data = (0..<guest.blocks).filter { guest.source.expected(block: $0) != 0 }
    #expect(guest.wrongBlocks(data).isEmpty)
    // Released: zero pages read as zero.
    guest.session.release()
    #expect(guest.wrongBlocks(0..<guest.blocks).isEmpty)
  }

  @Test(
    "Two regions with other offsets into the source keep apart", arguments: MemoryCase.smallPages)
  func regions(kind: MemoryCase) throws {
    let first = try GuestMemoryObject(backing: kind.backing, length: 64 * 4096)
    let second = try GuestMemoryObject(backing: kind.backing, length: 64 * 4096)
    let source = PatternSource()
    let session = try PagerSession(
      userfaultfd: try Userfaultfd(wanting: PagerSession<PatternSource>.features.wanted),
      regions: [
        try PagedRegion(first, mode: kind.mode),
        try PagedRegion(
          second, mode: kind.mode, guestAddress: GuestAddress(64 * 4096), sourceOffset: 64 * 4096),
      ], source: source)
    try session.start()
    defer { session.release() }
    for block in 0..<64 {
      #expect(load(first.range, offset: block * 4096) == source.expected(block: block))
      #expect(load(second.range, offset: block * 4096) == source.expected(block: block + 64))
    }
  }

  @Test("Regions that overlap are refused")
  func overlap() throws {
    let memory = try GuestMemoryObject(backing: .anonymous, length: 16 * 4096)
    let regions = [
      try PagedRegion(memory, mode: .missing), try PagedRegion(memory, mode: .missing),
    ]
    #expect {
      _ = try PagerSession(
        userfaultfd: try Userfaultfd(), regions: regions, source: PatternSource())
    } throws: { error in
      (error as? PagerError)?.code == .invalidRegion
    }
  }

  @Test("MINOR on anonymous memory is refused")
  func minorOnAnonymous() throws {
    let memory = try GuestMemoryObject(backing: .anonymous, length: 4096)
    #expect(throws: Errno.invalidArgument) { try PagedRegion(memory, mode: .minor) }
  }
}
