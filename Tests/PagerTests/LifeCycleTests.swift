// SPDX-License-Identifier: Apache-2.0

import GuestMemory
import LinuxSystem
import Synchronization
import TestSupport
import Testing
import Userfault

@testable import Pager

@Suite("Handlers stop, start again and go away")
struct LifeCycleTests {
  @Test("A stopped handler loses no fault: after start the waiters go on", arguments: cases)
  func stopAndStart(kind: MemoryCase) throws {
    let guest = try ServedMemory(kind, pages: kind.pages(512))
    let wrong = Atomic<Int>(0)
    let touchers = try (0..<4).map { thread in
      try ThreadHandle.start {
        let order = (0..<guest.blocks).map { ($0 &* 7 &+ thread &* 13) % guest.blocks }
        wrong.wrappingAdd(guest.wrongBlocks(order).count, ordering: .relaxed)
      }
    }
    for _ in 0..<10 {
      guest.session.stop()
      Delay.microseconds(2000)
      try guest.session.start()
      Delay.microseconds(2000)
    }
    for toucher in touchers { toucher.join() }
    #expect(wrong.load(ordering: .relaxed) == 0)
  }

  @Test(
    "A handler that read faults and died leaves waiters whom its successor serves", arguments: cases
  )
  func crashedHandler(kind: MemoryCase) throws {
    let guest = try ServedMemory(kind, pages: kind.pages(8), start: false)
    let values = Mutex<[UInt64]>([])
    let toucher = try ThreadHandle.start {
      let value = load(guest.range, offset: 0)
      values.withLock { $0.append(value) }
    }
    // Read the fault and drop it, as a handler does that dies in between.
    #expect(Delay.until { guest.session.dropOneFault() })
    try guest.session.start()
    toucher.join()
    #expect(values.withLock { $0 } == [guest.source.expected(block: 0)])
  }

  @Test("release wakes those who wait, also on MINOR-only ranges", arguments: MemoryCase.smallPages)
  func release(kind: MemoryCase) throws {
    let guest = try ServedMemory(kind, pages: 8, start: false)
    let isDone = Atomic<Bool>(false)
    let toucher = try ThreadHandle.start {
      _ = load(guest.range, offset: 0)
      isDone.store(true, ordering: .releasing)
    }
    Delay.microseconds(20_000)
    #expect(isDone.load(ordering: .acquiring) == false)
    guest.session.release()
    #expect(Delay.until { isDone.load(ordering: .acquiring) })
    toucher.join()
  }

  @Test("release lets go of those who gave memory back when nobody served any more")
  func releasesEvents() throws {
    let guest = try ServedMemory(MemoryCase.all[0], pages: 8)
    guest.session.stop()
    let isDone = Atomic<Bool>(false)
    let giver = try ThreadHandle.start {
      try? guest.memory.mapping.advise(.dontNeed, offset: 0, length: 4096)
      isDone.store(true, ordering: .releasing)
    }
    Delay.microseconds(20_000)
    #expect(isDone.load(ordering: .acquiring) == false)
    guest.session.release()
    #expect(Delay.until { isDone.load(ordering: .acquiring) })
    giver.join()
  }

  @Test("Many who start a session at once start its threads once")
  func concurrentStarts() async {
    await #expect(processExitsWith: .success) {
      let guest = try ServedMemory(MemoryCase.all[0], pages: 8, start: false)
      for _ in 0..<50 {
        try inThreads(8) { _ in try? guest.session.start() }
        precondition(Delay.until { Host.threads(named: "fault0") > 0 }, "not started")
        precondition(Host.threads(named: "fault0") == 1, "more than one")
        guest.session.stop()
        precondition(Delay.until { Host.threads(named: "fault0") == 0 }, "a thread is left")
      }
    }
  }

  @Test("A session leaves no descriptor and no thread behind")
  func leavesNothingBehind() async {
    await #expect(processExitsWith: .success) {
      func threads() -> Int { (try? Host.threadCount()) ?? -1 }
      func cycle() throws {
        for kind in MemoryCase.smallPages {
          let guest = try ServedMemory(kind, pages: 64)
          try inThreads(4) { _ in _ = guest.wrongBlocks(0..<64) }
          try guest.session.populate()
          guest.session.stop()
          try guest.session.start()
          guest.session.release()
        }
      }
      try cycle()
      let before = (openDescriptorCount(), threads())
      for _ in 0..<5 { try cycle() }
      precondition(openDescriptorCount() == before.0, "descriptors leak")
      precondition(Delay.until { threads() <= before.1 }, "threads leak")
    }
  }
}

extension PagerSession {
  /// Reads a batch of events and forgets them; `true` when there was a fault.
  func dropOneFault() -> Bool {
    var events = EventBuffer()
    guard let count = try? events.read(from: memory.userfaultfd), count > 0 else { return false }
    while events.pop() != nil {}
    return true
  }
}

@Suite("A page without right content is told, not filled")
struct DamageTests {
  @Test(
    "A damaged page is poisoned, its neighbours are right",
    .enabled(if: Host.has(.poison), "needs UFFDIO_POISON (Linux 6.6)"), arguments: cases)
  func poison(kind: MemoryCase) throws {
    let source = PatternSource(damagedBlocks: [3])
    let guest = try ServedMemory(kind, pages: kind.pages(16), source: source)
    let perPage = guest.pageBytes / 4096
    for block in 0..<guest.blocks {
      let value = guardedLoad(guest.range, offset: block * 4096)
      if block / perPage == 3 / perPage {
        #expect(value == .busError, "block \(block)")
      } else {
        #expect(value == .value(source.expected(block: block)), "block \(block)")
      }
    }
    // Also after the guest gave the marker up or asks again.
    #expect(guardedLoad(guest.range, offset: 3 * 4096) == .busError)
    let failure = try #require(guest.session.failures.first)
    #expect(guest.session.failures.count == 1)
    #expect(failure.isPoisoned)
    #expect(failure.description.contains("block 3 is damaged"))
    #expect(guest.session.statistics.failedPages == 1)
  }

  @Test("populate reports damaged pages and fills all others", arguments: MemoryCase.smallPages)
  func populateDamaged(kind: MemoryCase) throws {
    let source = PatternSource(damagedBlocks: [3, 100, 101])
    let guest = try ServedMemory(kind, pages: 256, source: source)
    #expect {
      try guest.session.populate()
    } throws: { error in
      (error as? PagerError)?.code == .damagedPages
    }
    guest.session.release()
    for block in 0..<256 {
      let expected: GuardedValue =
        source.damagedBlocks.contains(block) ? .busError : .value(source.expected(block: block))
      #expect(guardedLoad(guest.range, offset: block * 4096) == expected, "block \(block)")
    }
  }
}
