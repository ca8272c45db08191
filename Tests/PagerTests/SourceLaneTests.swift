// SPDX-License-Identifier: Apache-2.0

import GuestMemory
import LinuxSystem
import Synchronization
import TestSupport
import Testing
import Userfault

@testable import Pager

@Suite("Sources that make a page wait")
struct SourceLaneTests {
  /// Anonymous memory of this process that a hooked source fills.
  private final class Served: Sendable {
    let memory: GuestMemoryObject
    let session: PagerSession<HookedSource>

    init(
      pages: Int = 64, timeout: UInt64 = 60_000_000_000, onDamage: DamagePolicy = .poison,
      _ hook: @escaping @Sendable (Int) throws(PageSourceError) -> Void
    ) throws {
      let memory = try GuestMemoryObject(backing: .anonymous, length: pages * 4096)
      var options = PagerOptions()
      options.faultAround = .off
      options.sourceTimeout = timeout
      options.onDamage = onDamage
      session = try PagerSession(
        userfaultfd: try Userfaultfd(wanting: PagerSession<HookedSource>.features.wanted),
        regions: [try PagedRegion(memory, mode: .missing)], source: HookedSource(hook),
        options: options)
      self.memory = memory
      try session.start()
    }

    deinit { session.release() }
    var range: HostRange { memory.range }
  }

  @Test("A page that takes long holds up no other page of its session")
  func otherPages() throws {
    let gate = ThreadGate()
    let served = try Served { (block) throws(PageSourceError) in if block == 5 { gate.wait() } }
    let isDone = Atomic<Bool>(false)
    let waiter = try ThreadHandle.start {
      #expect(load(served.range, offset: 5 * 4096) == HookedSource.expected(block: 5))
      isDone.store(true, ordering: .releasing)
    }
    #expect(Delay.until { served.session.pendingReads == 1 })
    for block in 6..<64 {
      #expect(load(served.range, offset: block * 4096) == HookedSource.expected(block: block))
    }
    let wasDone = isDone.load(ordering: .acquiring)
    #expect(!wasDone)
    gate.open()
    waiter.join()
    #expect(Delay.until { served.session.statistics.deferredFaults == 59 })
  }

  @Test("A source that is out of reach is asked again, and its pages are right then")
  func recovers() throws {
    let refusals = Atomic<Int>(5)
    let served = try Served { (_) throws(PageSourceError) in
      if refusals.wrappingSubtract(1, ordering: .relaxed).newValue >= 0 {
        throw PageSourceError("out of reach", mayRecover: true)
      }
    }
    for block in 0..<8 {
      #expect(load(served.range, offset: block * 4096) == HookedSource.expected(block: block))
    }
    #expect(served.session.failures.isEmpty)
  }

  @Test("A source that stays out of reach for too long costs its page, which is named")
  func staysAway() throws {
    let served = try Served(timeout: 200_000_000) { (block) throws(PageSourceError) in
      if block == 3 { throw PageSourceError("the server is out of reach", mayRecover: true) }
    }
    try #require(served.session.canPoison, "this kernel has no UFFDIO_POISON")
    #expect(guardedLoad(served.range, offset: 3 * 4096) == .busError)
    #expect(served.session.failures.map(\.reason) == ["the server is out of reach"])
    #expect(load(served.range, offset: 4096) == HookedSource.expected(block: 1))
  }

  @Test("A read that never comes back costs its page, and those that queue behind it, in time")
  func stuck() throws {
    let gate = ThreadGate()
    // More than there are threads to read.
    let stuck = 8
    let served = try Served(timeout: 200_000_000) { (block) throws(PageSourceError) in
      if block < stuck { gate.wait() }
    }
    try #require(served.session.canPoison, "this kernel has no UFFDIO_POISON")
    try inThreads(stuck) { block in
      #expect(guardedLoad(served.range, offset: block * 4096) == .busError)
    }
    #expect(served.session.failures.count == stuck)
    // The session can be stopped while its threads are still stuck.
    served.session.stop()
    gate.open()
    #expect(Delay.until { served.session.pendingReads == 0 })
    // What they bring after all is not taken.
    try served.session.start()
    #expect(guardedLoad(served.range, offset: 0) == .busError)
  }

  @Test("Where damage is to wait, who touches it waits until its content is looked for again")
  func waits() throws {
    let isDamaged = Atomic<Bool>(true)
    let served = try Served(onDamage: .wait) { (block) throws(PageSourceError) in
      if block == 2, isDamaged.load(ordering: .acquiring) { throw PageSourceError("damaged") }
    }
    let value = Atomic<UInt64>(1)
    let waiter = try ThreadHandle.start {
      value.store(load(served.range, offset: 2 * 4096), ordering: .releasing)
    }
    #expect(Delay.until { served.session.failures.count == 1 })
    served.session.retryFailed()
    #expect(Delay.until { served.session.statistics.failedPages == 2 })
    #expect(value.load(ordering: .acquiring) == 1)
    isDamaged.store(false, ordering: .releasing)
    served.session.retryFailed()
    waiter.join()
    #expect(value.load(ordering: .acquiring) == HookedSource.expected(block: 2))
  }

  @Test("Where damage is to stop the guest, a touch does, and finding it does not")
  func stops() throws {
    let guest = try GuestProcess(pages: 64, threads: 1)
    let session = try guest.session(
      HookedSource { (block) throws(PageSourceError) in
        if block == 40 { throw PageSourceError("damaged") }
      }, onDamage: .stopVMM)
    try session.start()
    #expect(throws: PagerError.self) { try session.populate() }
    #expect(session.failures.count == 1)
    #expect(!session.hasEnded)
    try guest.go()
    #expect(Delay.until { session.hasEnded })
    session.release()
  }

  @Test("What was given back while it was being looked for is zero")
  func removed() throws {
    let gate = ThreadGate()
    let served = try Served { (block) throws(PageSourceError) in if block == 5 { gate.wait() } }
    let value = Atomic<UInt64>(1)
    let waiter = try ThreadHandle.start {
      value.store(load(served.range, offset: 5 * 4096), ordering: .releasing)
    }
    #expect(Delay.until { served.session.pendingReads == 1 })
    try served.memory.mapping.advise(.dontNeed, offset: 5 * 4096, length: 4096)
    gate.open()
    waiter.join()
    #expect(value.load(ordering: .acquiring) == 0)
  }

  @Test("Its threads go when they have nothing to do, and leave nothing behind")
  func threadsEnd() async {
    await #expect(processExitsWith: .success) {
      let served = try Served { (_) throws(PageSourceError) in }
      let before = try Host.threadCount()
      precondition(load(served.range, offset: 0) == HookedSource.expected(block: 0))
      let during = try Host.threadCount()
      precondition(during > before, "no thread came")
      precondition(Delay.until { (try? Host.threadCount()) == before }, "a thread stayed")
    }
  }
}
