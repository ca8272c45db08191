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

@Suite("Memory that is let go of while its guest runs")
struct LettingGoTests {
  private static let pages = 512

  /// How a guest is let go of.
  enum Way: CaseIterable { case filled, atOnce, ended }

  @Test(
    "Pages that wait for their source become content or errors, never zeros",
    arguments: Way.allCases,
    [false, true])
  func waiting(way: Way, isPooled: Bool) throws {
    let pool = try PagerPool(threads: 2, capacity: 1)
    let memory = try GuestMemoryObject(backing: .anonymous, length: Self.pages * 4096)
    let region = try PagedRegion(memory, mode: .missing)
    // Storage that answers in a millisecond, but for one block in seven.
    let bad = Set(stride(from: 3, to: Self.pages, by: 97))
    let session = try PagerSession(
      userfaultfd: try Userfaultfd(wanting: PagerSession<PatternSource>.features.wanted),
      regions: [region], source: PatternSource(damagedBlocks: bad, delay: 1000))
    if isPooled { try session.start(in: pool) } else { try session.start() }
    let range = memory.range
    let found = Mutex<[Int: GuardedValue]>([:])
    let started = Atomic<Int>(0)
    let touchers = try (0..<64).map { number in
      try ThreadHandle.start {
        for index in 0..<Self.pages / 64 {
          let page = index * 64 + (number * 7) % 64
          started.wrappingAdd(1, ordering: .relaxed)
          let value = guardedLoad(range, offset: page * 4096)
          found.withLock { $0[page] = value }
        }
      }
    }
    #expect(Delay.until { started.load(ordering: .relaxed) > 80 })
    switch way {
    case .filled:
      try session.startFill()
      #expect(Delay.until { session.fillProgress.phase == .done })
      #expect(session.isFilled)
      #expect(session.letGo() == .missing(pages: bad.count))
    case .atOnce: _ = session.letGo()
    case .ended:
      session.stop()
      _ = session.letGo()
    }
    for toucher in touchers { toucher.join() }
    for page in 0..<Self.pages {
      let right = GuardedValue.value(PatternSource.word(block: page, seed: 7))
      let last = guardedLoad(range, offset: page * 4096)
      let touched = found.withLock { $0[page] } ?? last
      if bad.contains(page) {
        #expect(last == .busError, "page \(page)")
      } else if way == .filled {
        #expect(last == right && touched == right, "page \(page)")
      } else {
        #expect(
          [right, .busError].contains(last) && [right, .busError].contains(touched), "page \(page)")
      }
    }
    pool.stop()
  }

  @Test("Nor do those that a thread has which is stuck in its source", arguments: [false, true])
  func stuck(fills: Bool) throws {
    let isHeld = Held()
    isHeld.value.store(true, ordering: .releasing)
    let memory = try GuestMemoryObject(backing: .anonymous, length: 16 * 4096)
    let session = try PagerSession(
      userfaultfd: try Userfaultfd(wanting: PagerSession<HookedSource>.features.wanted),
      regions: [try PagedRegion(memory, mode: .missing)],
      source: HookedSource { _ in
        while isHeld.value.load(ordering: .acquiring) { Delay.microseconds(200) }
      })
    try session.start()
    if fills { try session.startFill() }
    let touched = Mutex<GuardedValue?>(nil)
    let range = memory.range
    let toucher = try ThreadHandle.start {
      let value = guardedLoad(range, offset: 4096)
      touched.withLock { $0 = value }
    }
    #expect(Delay.until { session.statistics.faults > 0 })
    #expect(session.letGo() == .missing(pages: 16))
    toucher.join()
    #expect(touched.withLock { $0 } == .busError)
    isHeld.value.store(false, ordering: .releasing)
    for page in 0..<16 { #expect(guardedLoad(range, offset: page * 4096) == .busError) }
  }

  private final class Held: Sendable { let value = Atomic<Bool>(false) }

  @Test("A guest that gives memory back while it is let go of gets zeros there, and goes on")
  func balloon() throws {
    for _ in 0..<8 {
      let guest = try ServedMemory(MemoryCase.all[0], pages: 1024)
      let isDone = Atomic<Bool>(false)
      try inThreads(2) { thread in
        if thread == 0 {
          Delay.microseconds(2000)
          _ = guest.session.letGo()
          isDone.store(true, ordering: .releasing)
          return
        }
        var first = 0
        while !isDone.load(ordering: .acquiring) {
          try? guest.memory.mapping.advise(.dontNeed, offset: first * 4096, length: 16 * 4096)
          for block in first..<first + 16 {
            let value = guardedLoad(guest.range, offset: block * 4096)
            if value != .value(0) { Issue.record("block \(block): \(value)") }
          }
          first = (first + 16) % 512
        }
      }
      for block in 512..<1024 {
        let right = GuardedValue.value(guest.source.expected(block: block))
        #expect([right, .busError].contains(guardedLoad(guest.range, offset: block * 4096)))
      }
    }
  }
}
