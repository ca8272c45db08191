// SPDX-License-Identifier: Apache-2.0

import GuestMemory
import LinuxSystem
import Synchronization
import TestSupport
import Testing
import Userfault

@testable import Pager

/// `PatternSource`, whose reads that reach certain pages wait for a gate.
private final class GatedSource: PageSource {
  let gate = ThreadGate()
  private let blocks: [Range<Int>]
  private let isAtHand: Bool
  private let pattern = PatternSource()
  private let reached = Atomic<Int>(0)

  /// - Parameter isAtHand: it promises to have everything at hand, and makes fault threads wait.
  init(blocks: [Range<Int>], isAtHand: Bool) {
    (self.blocks, self.isAtHand) = (blocks, isAtHand)
  }

  /// How many reads have come to the gate.
  var waitingReads: Int { reached.load(ordering: .acquiring) }

  @unsafe func read(
    region: Int, offset: Int, length: Int, into buffer: UnsafeMutableRawPointer
  ) throws(PageSourceError) -> SourceRun {
    let wanted = offset / 4096..<(offset + length) / 4096
    if blocks.contains(where: { $0.overlaps(wanted) }) {
      reached.wrappingAdd(1, ordering: .releasing)
      gate.wait()
    }
    // SAFETY: as the caller vouches.
    return try unsafe pattern.read(region: region, offset: offset, length: length, into: buffer)
  }

  @unsafe func readAtHand(
    region: Int, offset: Int, length: Int, into buffer: UnsafeMutableRawPointer
  ) throws(PageSourceError) -> SourceRun? {
    guard isAtHand else { return nil }
    // SAFETY: as the caller vouches.
    return try unsafe read(region: region, offset: offset, length: length, into: buffer)
  }
}

/// Memory of this process with a session over a source.
private final class Served<Source: PageSource>: Sendable {
  let memory: GuestMemoryObject
  let region: PagedRegion
  let session: PagerSession<Source>

  init(
    _ kind: MemoryCase, pages: Int, source: Source, threads: Int, faultAround: FaultAround = .off
  ) throws {
    let memory = try GuestMemoryObject(
      backing: kind.backing, length: pages * kind.backing.pageSize.bytes)
    region = try PagedRegion(memory, mode: kind.mode)
    var options = PagerOptions(faultThreads: threads)
    options.faultAround = faultAround
    session = try PagerSession(
      userfaultfd: try Userfaultfd(wanting: PagerSession<Source>.features.wanted),
      regions: [region], source: source, options: options)
    self.memory = memory
    try session.start()
  }

  deinit { session.release() }

  var range: HostRange { memory.range }
  var blocksInPage: Int { region.pageSize.bytes / 4096 }
  var blocks: Int { region.pageCount * blocksInPage }
}

@Suite("Sources that are slow, incomplete and damaged")
struct UnsteadySourceTests {
  @Test(
    "Damaged pages are poisoned and named, all others right: late, in pieces, after refusals",
    arguments: cases, StormWay.all.filter { !$0.isPooled })
  func eachPageByItself(kind: MemoryCase, way: StormWay) throws {
    let seed = UInt64(testSetting("FAULTLINE_SOURCE_SEED", usual: 1))
    var random = SeededRandom(seed: seed)
    let isSmall = kind.backing.pageSize == .size4KiB
    let pages = isSmall ? 256 : 4
    let blocksInPage = isSmall ? 1 : 512
    var habits = UnsteadySource.Habits()
    habits.longestDelay = 1000
    habits.givesShortRuns = true
    habits.atHandPercent = 60
    for _ in 0..<8 { habits.refusals[random.below(pages * blocksInPage)] = 1 + random.below(2) }
    for _ in 0..<(isSmall ? 12 : 1) {
      habits.damagedBlocks.insert(random.below(pages * blocksInPage))
    }
    let served = try Served(
      kind, pages: pages, source: UnsteadySource(habits, seed: seed), threads: way.threads,
      faultAround: way.faultAround)
    try #require(served.session.canPoison, "this kernel has no UFFDIO_POISON")
    let damagedPages = Set(habits.damagedBlocks.map { $0 / blocksInPage })
    let wrong = Mutex<[String]>([])
    try inThreads(4) { thread in
      guard thread > 0 else {
        // It throws where it is the first to come to a damaged page.
        try? served.session.populate()
        return
      }
      for index in 0..<served.blocks {
        let block = (index &* 5 &+ thread &* 61) % served.blocks
        let seen = guardedLoad(served.range, offset: block * 4096)
        let right: GuardedValue =
          damagedPages.contains(block / blocksInPage)
          ? .busError : .value(UnsteadySource.expected(block: block))
        if seen != right { wrong.withLock { $0.append("\(block): \(seen), not \(right)") } }
      }
    }
    #expect(wrong.withLock { $0.prefix(8) } == [], "seed \(seed)")
    let failures = served.session.failures
    let named = failures.map { Int($0.guestAddress.rawValue) / served.region.pageSize.bytes }
    #expect(named.sorted() == damagedPages.sorted(), "seed \(seed)")
    #expect(served.session.statistics.failedPages == damagedPages.count)
    for failure in failures {
      let isNamed = habits.damagedBlocks.contains { failure.reason == "block \($0) is damaged" }
      #expect(failure.isPoisoned && isNamed, "seed \(seed): \(failure)")
    }
  }

  @Test(
    "Fault threads that a source makes wait lose no fault, and others serve all other pages",
    arguments: MemoryCase.smallPages, [2, 3])
  func stuckFaultThreads(kind: MemoryCase, threads: Int) throws {
    let slow = (1..<threads).map { $0 * 20 }
    let source = GatedSource(blocks: slow.map { $0..<$0 + 1 }, isAtHand: true)
    let served = try Served(kind, pages: 64, source: source, threads: threads)
    let right = Atomic<Int>(0)
    var waiters: [ThreadHandle] = []
    for block in slow {
      // Two that wait for the same page.
      for _ in 0..<2 {
        waiters.append(
          try ThreadHandle.start {
            let value = load(served.range, offset: block * 4096)
            if value == PatternSource.word(block: block, seed: 7) {
              right.wrappingAdd(1, ordering: .relaxed)
            }
          })
      }
      #expect(Delay.until { source.waitingReads == waiters.count / 2 })
    }
    for block in 0..<64 where !slow.contains(block) {
      #expect(load(served.range, offset: block * 4096) == PatternSource.word(block: block, seed: 7))
    }
    #expect(right.load(ordering: .relaxed) == 0)
    source.gate.open()
    for waiter in waiters { waiter.join() }
    #expect(right.load(ordering: .relaxed) == waiters.count)
    #expect(served.session.failures.isEmpty)
  }

  /// Who reads a page from its source when it is given up.
  enum Reader: CaseIterable { case lane, faultThread, filling }

  @Test(
    "A page that is given up while it is being read is zero, and whoever waits for it goes on",
    arguments: cases, Reader.allCases)
  func givenUpMeanwhile(kind: MemoryCase, reader: Reader) throws {
    let advices: [MemoryAdvice] =
      kind.backing == .anonymous ? [.dontNeed] : [.remove, .dontNeed]
    for advice in advices {
      let blocksInPage = kind.backing.pageSize.bytes / 4096
      let page = 1
      let source = GatedSource(
        blocks: [page * blocksInPage..<(page + 1) * blocksInPage], isAtHand: reader == .faultThread)
      let served = try Served(kind, pages: kind.pages(64), source: source, threads: 2)
      let size = served.region.pageSize.bytes
      var filler: ThreadHandle?
      if reader == .filling {
        filler = try ThreadHandle.start { try? served.session.populate() }
        #expect(Delay.until { source.waitingReads == 1 })
      }
      let seen = Atomic<UInt64>(1)
      let waiter = try ThreadHandle.start {
        seen.store(load(served.range, offset: page * size), ordering: .releasing)
      }
      #expect(
        Delay.until { source.waitingReads == 1 && served.session.statistics.faults == 1 })
      try served.memory.mapping.advise(advice, offset: page * size, length: size)
      source.gate.open()
      waiter.join()
      filler?.join()
      #expect(seen.load(ordering: .acquiring) == 0, "\(advice)")
      for block in 0..<served.blocks {
        let isGivenUp = block / blocksInPage == page
        let right = isGivenUp ? 0 : PatternSource.word(block: block, seed: 7)
        #expect(load(served.range, offset: block * 4096) == right, "\(advice), block \(block)")
      }
      #expect(served.session.failures.isEmpty)
    }
  }

  @Test("Filling stops soon after the guest's process is gone")
  func fillingEnds() throws {
    let guest = try GuestProcess(pages: 1024, threads: 1)
    let gate = ThreadGate()
    let reads = Atomic<Int>(0)
    let session = try guest.session(
      HookedSource { (_) throws(PageSourceError) in
        reads.wrappingAdd(1, ordering: .relaxed)
        gate.wait()
        // What is out of reach for a guest that is gone is no damage.
        throw PageSourceError("out of reach", mayRecover: true)
      })
    try session.start()
    let filler = try ThreadHandle.start {
      #expect(throws: PagerError.self) { try session.populate() }
    }
    #expect(Delay.until { reads.load(ordering: .relaxed) == 1 })
    guest.kill()
    #expect(Delay.until { session.hasEnded })
    gate.open()
    filler.join()
    session.release()
    #expect(reads.load(ordering: .relaxed) < 8)
    #expect(session.failures.isEmpty)
  }
}
