// SPDX-License-Identifier: Apache-2.0

import Foundation
import LinuxSystem
import Synchronization
import TestSupport
import Testing

@testable import Pager

@Suite("Seats of a pool that are used again")
struct PoolSeatTests {
  enum Stale: CaseIterable { case faults, failedDescriptor, process }

  @Test(
    "An event of a session that has left does nothing to the one in its seat",
    arguments: Stale.allCases)
  func staleEvent(kind: Stale) throws {
    let watch = try PoolWatch(capacity: 1)
    var tools = try PoolTools()
    let worker = PoolWorker()
    let first = try SeatGuest()
    let place = try watch.add(first)
    switch kind {
    case .faults: first.raiseFault()
    case .failedDescriptor: first.fail()
    case .process: first.endProcess()
    }
    // One thread has taken the event when the session leaves and another one comes.
    let event = try #require(watch.next(milliseconds: 10_000))
    #expect(event.isReadable == (kind != .failedDescriptor))
    watch.remove(place, first, patience: 0)
    let second = try SeatGuest()
    let next = try watch.add(second)
    _ = watch.handle(event, worker, &tools)
    #expect(first.calls == [])
    #expect(second.calls == [])
    // Its own events come as ever.
    second.endProcess()
    _ = watch.handle(try #require(watch.next(milliseconds: 10_000)), worker, &tools)
    #expect(!watch.ask(try #require(watch.orphans.next())))
    second.raiseFault()
    _ = watch.handle(try #require(watch.next(milliseconds: 10_000)), worker, &tools)
    #expect(second.calls == ["process", "turn true"])
    watch.remove(next, second, patience: 0)
  }

  @Test("A turn that ends after its session has left watches nobody else's descriptor")
  func staleTurn() throws {
    let watch = try PoolWatch(capacity: 2)
    var tools = try PoolTools()
    let worker = PoolWorker()
    let first = try SeatGuest()
    let place = try watch.add(first)
    let next = Mutex<(place: PoolWatch.Place, guest: SeatGuest)?>(nil)
    // Between the end of the turn and the next watch the session is stopped and started again.
    first.onTurn = {
      watch.remove(place, first, patience: 0)
      guard let second = try? SeatGuest(startedAgain: first), let place = try? watch.add(second)
      else { return }
      next.withLock { $0 = (place, second) }
    }
    first.raiseFault()
    _ = watch.handle(try #require(watch.next(milliseconds: 10_000)), worker, &tools)
    let second = try #require(next.withLock { $0 })
    second.guest.raiseFault()
    _ = watch.handle(try #require(watch.next(milliseconds: 10_000)), worker, &tools)
    #expect(second.guest.calls == ["turn true"])
    watch.remove(second.place, second.guest, patience: 0)
  }
}

/// A session with descriptors that a test makes ready.
private final class SeatGuest: PooledGuest, @unchecked Sendable {
  // SAFETY: the tests of this file use it from one thread.
  private let faults: Pipe
  private let process: EventDescriptor
  private let faultCount = Atomic<Int>(0)
  private(set) var calls: [String] = []
  var onTurn: (() -> Void)?

  /// - Parameter other: one that was stopped; this is the same session, started again.
  init(startedAgain other: SeatGuest? = nil) throws {
    faults = other?.faults ?? Pipe()
    process = try EventDescriptor()
  }

  func raiseFault() {
    faultCount.store(1, ordering: .relaxed)
    faults.fileHandleForWriting.write(Data([1]))
  }
  /// Without a writer a pipe reports nothing but EPOLLHUP.
  func fail() { try? faults.fileHandleForWriting.close() }
  func endProcess() { process.signal() }

  var name: String { "seat" }
  var stopDescriptor: CInt { -1 }
  var faultDescriptor: CInt { faults.fileHandleForReading.fileDescriptor }
  var processDescriptor: CInt { process.descriptor.rawValue }

  func turn(_ tools: inout PoolTools, isReadable: Bool) -> PooledTurn {
    calls.append("turn \(isReadable)")
    if faultCount.exchange(0, ordering: .relaxed) > 0 {
      _ = faults.fileHandleForReading.availableData
    }
    onTurn?()
    return .waits
  }

  var hasMemory: Bool { false }
  func wakeAll() {}
  func processHasEnded() { calls.append("process") }
  func leave(patience: UInt64) -> Bool { true }
}
