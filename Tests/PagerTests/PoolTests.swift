// SPDX-License-Identifier: Apache-2.0

import GuestMemory
import LinuxSystem
import Synchronization
import TestSupport
import Testing
import Userfault

@testable import Pager

@Suite("Sessions that share fault threads")
struct PoolTests {
  @Test("Each session gets its own content", arguments: MemoryCase.all, [1, 2])
  func content(kind: MemoryCase, threads: Int) throws {
    let pool = try PagerPool(threads: threads)
    let guests = try (0..<6).map { number in
      try ServedMemory(
        kind, pages: kind.backing.pageSize == .size4KiB ? 300 : 2,
        source: PatternSource(seed: UInt64(number) << 32), pool: pool)
    }
    try inThreads(6) { number in
      #expect(guests[number].wrongBlocks(0..<guests[number].blocks).isEmpty)
    }
    #expect(pool.sessionCount == 6)
    for guest in guests { guest.session.stop() }
    #expect(pool.sessionCount == 0)
  }

  @Test("A session with a slow source delays no other")
  func slowSource() throws {
    let pool = try PagerPool(threads: 1)
    let slow = try (0..<4).map { _ in
      try ServedMemory(
        MemoryCase.all[0], pages: 64, source: PatternSource(delay: 100_000), faultAround: .off,
        pool: pool)
    }
    let fast = try ServedMemory(
      MemoryCase.all[0], pages: 2000, faultAround: .off, pool: pool)
    let isDone = Atomic<Bool>(false)
    let threads = try slow.map { guest in
      try ThreadHandle.start {
        for block in 0..<64 where !isDone.load(ordering: .acquiring) {
          _ = load(guest.range, offset: block * 4096)
        }
      }
    }
    #expect(Delay.until { slow.allSatisfy { $0.session.pendingReads > 0 } })
    let before = slow.map { $0.session.statistics.copiedPages }.reduce(0, +)
    #expect(fast.wrongBlocks(0..<2000).isEmpty)
    // 2,000 faults that each waited for one slow read would see 2,000 of them.
    let during = slow.map { $0.session.statistics.copiedPages }.reduce(0, +) - before
    #expect(during < 500, "\(during) slow reads")
    isDone.store(true, ordering: .releasing)
    for thread in threads { thread.join() }
  }

  @Test("Sessions come and go while others are served")
  func comeAndGo() throws {
    let pool = try PagerPool(threads: 2, capacity: 16)
    let steady = try ServedMemory(MemoryCase.all[0], pages: 4096, faultAround: .off, pool: pool)
    let isDone = Atomic<Bool>(false)
    let others = try (0..<3).map { number in
      try ThreadHandle.start {
        while !isDone.load(ordering: .acquiring) {
          guard
            let guest = try? ServedMemory(
              MemoryCase.all[0], pages: 32, source: PatternSource(seed: UInt64(number)), pool: pool)
          else {
            Issue.record("no session")
            return
          }
          #expect(guest.wrongBlocks(0..<16).isEmpty)
          guest.session.stop()
          #expect(throws: Never.self) { try guest.session.start(in: pool) }
          #expect(guest.wrongBlocks(0..<32).isEmpty)
        }
      }
    }
    #expect(steady.wrongBlocks(0..<4096).isEmpty)
    isDone.store(true, ordering: .releasing)
    for other in others { other.join() }
  }

  @Test("A pool that is full says so, and has room again when a session leaves")
  func capacity() throws {
    let pool = try PagerPool(threads: 1, capacity: 2)
    let first = try ServedMemory(MemoryCase.all[0], pages: 4, pool: pool)
    let second = try ServedMemory(MemoryCase.all[0], pages: 4, pool: pool)
    let third = try ServedMemory(MemoryCase.all[0], pages: 4, start: false)
    let error = #expect(throws: PagerError.self) { try third.session.start(in: pool) }
    #expect(error?.code == .resources)
    first.session.stop()
    try third.session.start(in: pool)
    #expect(third.wrongBlocks(0..<4).isEmpty)
    #expect(second.wrongBlocks(0..<4).isEmpty)
  }

  @Test("A guest that is killed ends its session and no other")
  func killed() throws {
    let pool = try PagerPool(threads: 1)
    let steady = try ServedMemory(MemoryCase.all[0], pages: 256, faultAround: .off, pool: pool)
    for round in 0..<4 {
      let guest = try GuestProcess(pages: 1024, threads: 2)
      let session = try guest.session(PatternSource(delay: round % 2 == 0 ? 0 : 200))
      try session.start(in: pool)
      try guest.go()
      #expect(Delay.until { session.statistics.faults > UInt64(round * 20) })
      guest.kill()
      #expect(Delay.until { session.hasEnded })
      session.release()
      #expect(steady.wrongBlocks(round * 64..<(round + 1) * 64).isEmpty)
    }
    #expect(pool.sessionCount == 1)
  }

  @Test("256 idle sessions cost no processor time, and leave nothing behind")
  func idle() async {
    await #expect(processExitsWith: .success) {
      func cycle() throws {
        let pool = try PagerPool(threads: 2)
        let guests = try (0..<256).map { number in
          try ServedMemory(
            MemoryCase.all[0], pages: 8, source: PatternSource(seed: UInt64(number)), pool: pool)
        }
        precondition(guests.allSatisfy { $0.wrongBlocks(0..<4).isEmpty })
        let before = processorTime()
        Delay.microseconds(1_000_000)
        let used = processorTime() - before
        precondition(used < 0.2, "\(used) s of a second")
        precondition(guests.allSatisfy { $0.wrongBlocks(4..<8).isEmpty })
        for guest in guests { guest.session.release() }
        pool.stop()
      }
      try cycle()
      let descriptors = openDescriptorCount()
      let threads = try Host.threadCount()
      try cycle()
      precondition(Delay.until { openDescriptorCount() <= descriptors }, "descriptors leak")
      precondition(Delay.until { (try? Host.threadCount()) == threads }, "threads leak")
    }
  }
}
