// SPDX-License-Identifier: Apache-2.0

import Foundation
import LinuxSystem
import Synchronization
import TestSupport
import Testing

@testable import Pager

@Suite("Memory outlives the process that handed it over")
struct OrphanTests {
  enum Service: CaseIterable { case ownThread, ownThreads, pool }

  @Test("It is served until its own process ends", arguments: Service.allCases)
  func handedOverByAnother(service: Service) throws {
    let guest = try GuestProcess(pages: 512, threads: 2)
    let helper = Process()
    helper.executableURL = URL(fileURLWithPath: "/bin/sleep")
    helper.arguments = ["1000"]
    try launch(helper)
    let pool = service == .pool ? try PagerPool(threads: 1) : nil
    let session = try guest.session(
      PatternSource(), faultThreads: service == .ownThreads ? 2 : 1,
      peer: helper.processIdentifier)
    if let pool { try session.start(in: pool) } else { try session.start() }
    kill(helper.processIdentifier, SIGKILL)
    helper.waitUntilExit()
    // Longer than it takes to look once more.
    Delay.microseconds(1_500_000)
    try #require(!session.hasEnded)
    try guest.go()
    #expect(try guest.wrongWords() == 0)
    #expect(!session.hasEnded)
    guest.kill()
    #expect(Delay.until { session.hasEnded })
    session.release()
  }

  @Test(
    "A guest that keeps whoever asks for its memory holds up neither faults nor other questions")
  func stuckQuestion() throws {
    let told = Mutex<[String]>([])
    let pool = try PagerPool(threads: 1) { stuck in told.withLock { $0.append(stuck.session) } }
    let honest = try ServedMemory(MemoryCase.all[0], pages: 256, faultAround: .off, pool: pool)
    let holder = try AskedGuest("holder", holds: true)
    let gone = try AskedGuest("gone", holds: false)
    let places = (try pool.watch.add(holder), try pool.watch.add(gone))
    holder.process.signal()
    #expect(Delay.until { holder.isAsked.load(ordering: .acquiring) })
    gone.process.signal()
    #expect(Delay.until { gone.hasEnded.load(ordering: .acquiring) })
    #expect(honest.wrongBlocks(0..<256).isEmpty)
    #expect(Delay.until { told.withLock { $0 } == ["holder"] })
    // It is served again once the question has its answer.
    let isEarly = holder.isWoken.load(ordering: .acquiring)
    #expect(!isEarly)
    holder.holds.store(false, ordering: .releasing)
    #expect(Delay.until { holder.isWoken.load(ordering: .acquiring) })
    #expect(Delay.until { holder.hasEnded.load(ordering: .acquiring) })
    pool.watch.remove(places.0, holder, patience: 0)
    pool.watch.remove(places.1, gone, patience: 0)
  }
}

/// A session whose process ends when a test says so; its memory is gone at the second question.
private final class AskedGuest: PooledGuest {
  let name: String
  let process: EventDescriptor
  let holds: Atomic<Bool>
  let isAsked = Atomic<Bool>(false)
  let isWoken = Atomic<Bool>(false)
  let hasEnded = Atomic<Bool>(false)
  private let answers: Atomic<Int>
  private let faults: EventDescriptor
  private let sign: EventDescriptor

  init(_ name: String, holds: Bool) throws {
    self.name = name
    self.holds = Atomic(holds)
    answers = Atomic(holds ? 1 : 0)
    process = try EventDescriptor()
    faults = try EventDescriptor()
    sign = try EventDescriptor()
  }

  var faultDescriptor: CInt { faults.descriptor.rawValue }
  var processDescriptor: CInt { process.descriptor.rawValue }
  var stopDescriptor: CInt { sign.descriptor.rawValue }

  var hasMemory: Bool {
    isAsked.store(true, ordering: .releasing)
    while holds.load(ordering: .acquiring) { Delay.microseconds(1000) }
    return answers.wrappingSubtract(1, ordering: .relaxed).oldValue > 0
  }

  func turn(_ tools: inout PoolTools, isReadable: Bool) -> PooledTurn { .waits }
  func processHasEnded() { hasEnded.store(true, ordering: .releasing) }
  func wakeAll() { isWoken.store(true, ordering: .releasing) }
  func leave(patience: UInt64) -> Bool { true }
}
