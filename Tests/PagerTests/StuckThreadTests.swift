// SPDX-License-Identifier: Apache-2.0

import Foundation
import GuestMemory
import LinuxSystem
import Synchronization
import TestSupport
import Testing
import Userfault

@testable import Pager

/// In processes of their own: they count threads. The threads are stuck in a source that says it has
/// at hand what it has not: neither a lock of an address space nor one of a file can be held for
/// sure on every machine.
@Suite("A guest that keeps fault threads in the kernel holds up no other")
struct StuckThreadTests {
  @Test("Others are served while one thread is stuck, then all that there were at first")
  func stuck() async {
    await #expect(processExitsWith: .success) {
      alarm(900)
      let told = Mutex<[StuckThread]>([])
      let pool = try PagerPool(threads: 2, patience: 300_000_000) { stuck in
        told.withLock { $0.append(stuck) }
      }
      let honest = try ServedMemory(MemoryCase.all[0], pages: 1024, faultAround: .off, pool: pool)
      precondition(honest.wrongBlocks(0..<16).isEmpty)
      let holders = try (0..<3).map { try Holder(number: $0, pool) }
      for (number, holder) in holders.enumerated() {
        try holder.hold()
        // Served meanwhile, by the thread that is left, or that comes in place of the last one.
        precondition(honest.wrongBlocks(16 + number * 200..<16 + (number + 1) * 200).isEmpty)
        precondition(Delay.until { told.withLock { $0.count } == number + 1 }, "not noticed")
      }
      precondition(told.withLock { $0.map(\.session) } == ["vmm 0", "vmm 1", "vmm 2"])
      precondition(honest.wrongBlocks(616..<1024).isEmpty)

      // One leaves, although its thread does not come back.
      holders[0].session.stop()
      precondition(holders[0].session.hasEnded)
      do throws(PagerError) {
        try holders[0].session.start(in: pool)
        preconditionFailure("it was started again beside its thread")
      } catch {
        precondition(error.code == .ended)
      }
      // One goes on, with the thread that came back.
      holders[1].letGo()
      for page in 0..<Holder.pages {
        precondition(holders[1].isRight(page), "page \(page)")
      }
      // Two that all share, one in reserve, and those of the three.
      precondition(Delay.until { faultThreads() == 6 }, "\(faultThreads()) threads")
      holders[1].join()
      holders[1].session.stop()
      precondition(!holders[1].session.hasEnded)
      precondition(Delay.until { faultThreads() == 5 }, "its thread stays")
      holders[0].letGo()
      holders[2].letGo()
      holders[2].join()
      holders[2].session.release()
      // Also that of the session that was stopped before it came back: its last page came with it.
      holders[0].join()
      precondition(Delay.until { faultThreads() == 3 }, "threads stay")
      precondition(pool.sessionCount == 1)
      honest.session.release()
      pool.stop()
      precondition(Delay.until { Host.threads(named: "poolwatch") == 0 })
    }
  }

  @Test("Threads that are taken for stuck and are not lose nothing")
  func mistaken() async {
    await #expect(processExitsWith: .success) {
      alarm(900)
      func cycle() throws {
        let told = Atomic<Int>(0)
        let pool = try PagerPool(threads: 2, stuckAfter: 1) { _ in
          told.wrappingAdd(1, ordering: .relaxed)
        }
        for round in 0..<10 {
          let guests = try (0..<4).map { number in
            try ServedMemory(
              MemoryCase.all[0], pages: 600, source: PatternSource(seed: UInt64(number) << 32),
              faultAround: round % 2 == 0 ? .off : .adaptive, pool: pool)
          }
          try inThreads(4) { number in
            precondition(guests[number].wrongBlocks(0..<600).isEmpty)
          }
          for guest in guests { guest.session.release() }
        }
        precondition(told.load(ordering: .relaxed) > 0, "none was taken for stuck")
        pool.stop()
      }
      try cycle()
      let threads = try Host.threadCount()
      try cycle()
      precondition(Delay.until { (try? Host.threadCount()) ?? .max <= threads }, "threads stay")
    }
  }
}

/// Threads of pools.
private func faultThreads() -> Int { (0..<12).reduce(0) { $0 + Host.threads(named: "fault\($1)") } }

/// Content that is said to be at hand, and keeps the thread that asks for it until it may go: as a
/// guest does that has a lock of the kernel.
private final class HoldingSource: PageSource {
  let pattern = PatternSource()
  let holds = Atomic<Bool>(false)

  @unsafe func read(
    region: Int, offset: Int, length: Int, into buffer: UnsafeMutableRawPointer
  ) throws(PageSourceError) -> SourceRun {
    while holds.load(ordering: .acquiring) { Delay.microseconds(1000) }
    // SAFETY: as the caller vouches.
    return try unsafe pattern.read(region: region, offset: offset, length: length, into: buffer)
  }

  @unsafe func readAtHand(
    region: Int, offset: Int, length: Int, into buffer: UnsafeMutableRawPointer
  ) throws(PageSourceError) -> SourceRun? {
    try unsafe read(region: region, offset: offset, length: length, into: buffer)
  }
}

/// A guest that keeps the thread that serves it.
private final class Holder: Sendable {
  static var pages: Int { 64 }
  let session: PagerSession<HoldingSource>
  private let memory: GuestMemoryObject
  private let source = HoldingSource()
  private let thread = Mutex<ThreadHandle?>(nil)

  init(number: Int, _ pool: PagerPool) throws {
    memory = try GuestMemoryObject(backing: .anonymous, length: Self.pages * 4096)
    var options = PagerOptions()
    options.name = "vmm \(number)"
    options.faultAround = .off
    session = try PagerSession(
      userfaultfd: try Userfaultfd(wanting: PagerSession<HoldingSource>.features.wanted),
      regions: [try PagedRegion(memory, mode: .missing)], source: source, options: options)
    try session.start(in: pool)
  }

  func hold() throws {
    source.holds.store(true, ordering: .releasing)
    let handle = try ThreadHandle.start { [self] in
      precondition(load(memory.range, offset: 0) == source.pattern.expected(block: 0))
    }
    thread.withLock { $0 = handle }
  }

  /// The thread that serves it goes on.
  func letGo() { source.holds.store(false, ordering: .releasing) }

  /// Waits for the guest's own thread.
  func join() { thread.withLock { $0.take() }?.join() }

  func isRight(_ page: Int) -> Bool {
    load(memory.range, offset: page * 4096) == source.pattern.expected(block: page)
  }
}
