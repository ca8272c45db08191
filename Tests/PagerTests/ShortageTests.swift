// SPDX-License-Identifier: Apache-2.0

import Glibc
import GuestMemory
import LinuxSystem
import Pager
import Synchronization
import SystemPackage
import TestSupport
import Testing
import Userfault

@Suite(
  "Huge pages that are not to be had",
  .enabled(if: SmallHugePagePool.isAvailable, "needs root and huge pages"))
struct ShortageTests {
  /// Memory of an empty pool, and a session that serves it.
  private final class Subject: Sendable {
    let pool: SmallHugePagePool
    let memory: GuestMemoryObject
    let region: PagedRegion
    let session: PagerSession<PatternSource>
    private let shared: PagerPool?

    init(
      pages: Int, _ sharing: MappingSharing, isPooled: Bool = false,
      timeout: UInt64 = 3_600_000_000_000, onDamage: DamagePolicy = .poison
    ) throws {
      pool = try SmallHugePagePool(pages: pages)
      try pool.hold()
      memory = GuestMemoryObject(
        cloneMapping: try pool.makeMapping(pages: pages, sharing: sharing), pageSize: .size2MiB)
      region = try PagedRegion(
        host: memory.range, pageSize: .size2MiB, guestAddress: GuestAddress(0))
      var options = PagerOptions(faultThreads: 1)
      options.sourceTimeout = timeout
      options.onDamage = onDamage
      session = try PagerSession(
        userfaultfd: try Userfaultfd(wanting: PagerSession<PatternSource>.features.wanted),
        regions: [region], source: PatternSource(), options: options)
      shared = isPooled ? try PagerPool(threads: 1, capacity: 1) : nil
      if let shared { try session.start(in: shared) } else { try session.start() }
    }

    deinit {
      session.release()
      shared?.stop()
    }

    func value(ofPage page: Int) -> GuardedValue {
      guardedLoad(memory.range, offset: page * PageSize.size2MiB.bytes)
    }

    static func right(_ page: Int) -> GuardedValue {
      .value(PatternSource.word(block: page * 512, seed: 7))
    }
  }

  @Test(
    "A page that cannot be had stays absent, is tried again at a bounded pace, and gets its content",
    arguments: [MappingSharing.private, .shared], [false, true])
  func waits(sharing: MappingSharing, isPooled: Bool) throws {
    let subject = try Subject(pages: 2, sharing, isPooled: isPooled)
    let found = Mutex<[GuardedValue]>([])
    let touchers = try (0..<4).map { number in
      try ThreadHandle.start {
        let value = subject.value(ofPage: number % 2)
        found.withLock { $0.append(value) }
      }
    }
    #expect(Delay.until { subject.session.statistics.shortages > 4 })
    let before = subject.session.statistics
    let start = MonotonicClock.nanoseconds
    Delay.microseconds(400_000)
    let after = subject.session.statistics
    // Two pages, each at most 50 times a second, and as many faults of those that are woken; 12,640
    // in 0.4 s without a pace.
    let periods = Double(MonotonicClock.nanoseconds - start) / 20e6
    #expect(Double(after.shortages - before.shortages) < 3 * 2 * periods)
    #expect(Double(after.faults - before.faults) < 4 * 2 * periods)
    #expect(found.withLock { $0.isEmpty })
    #expect(subject.region.states.count(of: .present) == 0)
    #expect(after.failedPages == 0)
    try subject.pool.free()
    for toucher in touchers { toucher.join() }
    #expect(Set(found.withLock { $0 }.map { "\($0)" }).count == 2)
    #expect((0..<2).allSatisfy { subject.value(ofPage: $0) == Subject.right($0) })
  }

  @Test("After its time it is an error that says why, and no other page is harmed")
  func timesOut() throws {
    let subject = try Subject(pages: 2, .private, timeout: 300_000_000)
    #expect(subject.value(ofPage: 0) == .busError)
    let failure = try #require(subject.session.failures.first)
    #expect(failure.isPoisoned)
    #expect(failure.reason.contains("no free page of 2 MiB"), "\(failure.reason)")
    try subject.pool.free()
    #expect(subject.value(ofPage: 1) == Subject.right(1))
    #expect(subject.session.statistics.failedPages == 1)
  }

  @Test("Filling is not done while a page cannot be had")
  func fill() throws {
    let subject = try Subject(pages: 4, .private)
    try subject.session.startFill()
    #expect(Delay.until { subject.session.statistics.shortages > 2 })
    #expect(subject.session.fillProgress.phase != .done)
    #expect(!subject.session.isFilled)
    try subject.pool.free()
    #expect(Delay.until { subject.session.fillProgress.phase == .done })
    #expect(subject.session.isFilled)
    #expect(subject.session.letGo() == .complete)
    #expect((0..<4).allSatisfy { subject.value(ofPage: $0) == Subject.right($0) })
  }

  @Test(
    "Memory that is let go of without its pages has errors there, and no zeros",
    arguments: [DamagePolicy.poison, .wait], [false, true])
  func letGo(policy: DamagePolicy, fills: Bool) throws {
    let subject = try Subject(pages: 4, .private, onDamage: policy)
    try subject.pool.free(1)
    #expect(subject.value(ofPage: 2) == Subject.right(2))
    if fills {
      try subject.session.startFill()
      #expect(Delay.until { subject.session.statistics.shortages > 2 })
    }
    let touched = Mutex<GuardedValue?>(nil)
    let toucher = try ThreadHandle.start {
      let value = subject.value(ofPage: 1)
      touched.withLock { $0 = value }
    }
    #expect(Delay.until { subject.session.statistics.shortages > 2 })
    #expect(subject.session.letGo() == .missing(pages: 3))
    toucher.join()
    try subject.pool.free()
    #expect(touched.withLock { $0 } == .busError)
    #expect(subject.value(ofPage: 2) == Subject.right(2))
    for page in [0, 1, 3] { #expect(subject.value(ofPage: page) == .busError) }
  }

  @Test("populate returns when all pages are there, and not before")
  func populate() throws {
    let subject = try Subject(pages: 4, .shared)
    let isDone = Atomic<Bool>(false)
    let filler = try ThreadHandle.start {
      try? subject.session.populate()
      isDone.store(true, ordering: .releasing)
    }
    #expect(Delay.until { subject.session.statistics.shortages > 2 })
    let wasDone = isDone.load(ordering: .acquiring)
    #expect(!wasDone)
    try subject.pool.free()
    filler.join()
    #expect(subject.session.isFilled)
    #expect((0..<4).allSatisfy { subject.value(ofPage: $0) == Subject.right($0) })
  }

  @Test("A short shortage long after several faults on one page harms nobody")
  func afterIdling() throws {
    let subject = try Subject(pages: 2, .private, timeout: 1_500_000_000)
    try subject.pool.free()
    // Their second faults find the page there, to which hugetlbfs says the same as to a shortage.
    try inThreads(4) { _ in _ = subject.value(ofPage: 0) }
    Delay.microseconds(2_000_000)
    try subject.pool.hold()
    let found = Mutex<GuardedValue?>(nil)
    let toucher = try ThreadHandle.start {
      let value = subject.value(ofPage: 1)
      found.withLock { $0 = value }
    }
    #expect(Delay.until { subject.session.statistics.faults > 1 })
    Delay.microseconds(100_000)
    try subject.pool.free()
    toucher.join()
    #expect(found.withLock { $0 } == Subject.right(1))
    #expect(subject.session.statistics.failedPages == 0)
  }
}
