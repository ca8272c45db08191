// SPDX-License-Identifier: Apache-2.0

import GuestMemory
import LinuxSystem
import Synchronization
import SystemPackage
import TestSupport
import Testing
import Userfault

@testable import Pager

@Suite(
  "Callbacks hold up no fault", .enabled(if: Host.has(.poison), "needs UFFDIO_POISON (Linux 6.6)"))
struct ReporterTests {
  /// Who serves.
  enum Service: CaseIterable { case ownThreads, pool }

  /// What a session told.
  private final class Told: Sendable {
    let failures = Mutex<[GuestAddress]>([])
    let omitted = Mutex<[Int]>([])
    let ends = Mutex<[Int]>([])
    let isHeld = Atomic<Bool>(false)
    let isIn = Atomic<Bool>(false)

    /// Callbacks that wait while `isHeld`.
    func options(_ action: @escaping @Sendable () -> Void = {}) -> PagerOptions {
      var options = PagerOptions()
      options.faultAround = .off
      options.onFailure = { failure in
        self.isIn.store(true, ordering: .releasing)
        while self.isHeld.load(ordering: .acquiring) { Delay.microseconds(500) }
        self.failures.withLock { $0.append(failure.guestAddress) }
        action()
      }
      options.onFailuresOmitted = { count in self.omitted.withLock { $0.append(count) } }
      options.onEnd = { _ in
        let failures = self.failures.withLock { $0.count }
        self.ends.withLock { $0.append(failures) }
        action()
      }
      return options
    }
  }

  private final class Guest: Sendable {
    let memory: GuestMemoryObject
    let source: PatternSource
    let session: PagerSession<PatternSource>

    init(
      pages: Int, damaged: Range<Int> = 0..<0, _ options: PagerOptions = PagerOptions(),
      _ pool: PagerPool?
    ) throws {
      memory = try GuestMemoryObject(backing: .anonymous, length: pages * 4096)
      source = PatternSource(damagedBlocks: Set(damaged))
      session = try PagerSession(
        userfaultfd: try Userfaultfd(wanting: PagerSession<PatternSource>.features.wanted),
        regions: [try PagedRegion(memory, mode: .missing)], source: source, options: options)
      if let pool { try session.start(in: pool) } else { try session.start() }
    }

    deinit { session.release() }

    /// Touches pages one after the other, from a thread; whether that came to an end.
    func touch(_ blocks: Range<Int>) throws -> Bool {
      let isDone = Atomic<Bool>(false)
      let thread = try ThreadHandle.start { [self] in
        for block in blocks {
          let value = guardedLoad(memory.range, offset: block * 4096)
          if source.damagedBlocks.contains(block) {
            #expect(value == .busError)
          } else {
            #expect(value == .value(source.expected(block: block)))
          }
        }
        isDone.store(true, ordering: .releasing)
      }
      defer { thread.join() }
      let isInTime = Delay.until(seconds: 20) { isDone.load(ordering: .acquiring) }
      return isInTime
    }
  }

  private func pool(_ service: Service) throws -> PagerPool? {
    service == .pool ? try PagerPool(threads: 1) : nil
  }

  @Test(
    "One that does not come back holds up neither its session nor another",
    arguments: Service.allCases)
  func blocked(service: Service) throws {
    let (told, pool) = (Told(), try pool(service))
    told.isHeld.store(true, ordering: .releasing)
    let guest = try Guest(pages: 64, damaged: 3..<4, told.options(), pool)
    let other = try Guest(pages: 64, PagerOptions(), pool)
    // Lets go also when the expectation fails.
    let watchdog = try ThreadHandle.start {
      _ = Delay.until(seconds: 30) { !told.isHeld.load(ordering: .acquiring) }
      told.isHeld.store(false, ordering: .releasing)
    }
    #expect(try guest.touch(3..<4))
    #expect(Delay.until { told.isIn.load(ordering: .acquiring) })
    #expect(try other.touch(0..<64))
    #expect(try guest.touch(0..<64))
    #expect(told.failures.withLock { $0.isEmpty })
    told.isHeld.store(false, ordering: .releasing)
    #expect(Delay.until { told.failures.withLock { $0.count } == 1 })
    watchdog.join()
  }

  @Test(
    "Failures beyond what waits are counted, and the end comes once and last",
    arguments: Service.allCases)
  func bounded(service: Service) throws {
    let (told, pool) = (Told(), try pool(service))
    told.isHeld.store(true, ordering: .releasing)
    let guest = try Guest(pages: 600, damaged: 0..<600, told.options(), pool)
    #expect(try guest.touch(0..<1))
    #expect(Delay.until { told.isIn.load(ordering: .acquiring) })
    #expect(try guest.touch(1..<600))
    guest.session.end(.failed(.ioError))
    guest.session.end(.processGone)
    told.isHeld.store(false, ordering: .releasing)
    #expect(Delay.until { told.ends.withLock { !$0.isEmpty } })
    let heard = told.failures.withLock { $0 }
    #expect(heard == (0..<257).map { GuestAddress(UInt64($0 * 4096)) })
    #expect(told.omitted.withLock { $0 } == [600 - 257])
    guest.session.release()
    #expect(told.ends.withLock { $0 } == [257])
    #expect(guest.session.statistics.failedPages == 600)
  }

  @Test("They may stop and release their session", arguments: Service.allCases, [true, false])
  func stopping(service: Service, releases: Bool) throws {
    let (told, pool) = (Told(), try pool(service))
    let session = Mutex<PagerSession<PatternSource>?>(nil)
    let done = Atomic<Int>(0)
    let options = told.options {
      let session = session.withLock { $0 }
      if releases { session?.release() } else { session?.stop() }
      done.wrappingAdd(1, ordering: .releasing)
    }
    let guest = try Guest(pages: 8, damaged: 3..<4, options, pool)
    session.withLock { $0 = guest.session }
    #expect(try guest.touch(3..<4))
    #expect(Delay.until { done.load(ordering: .acquiring) == 1 })
    if let pool { try guest.session.start(in: pool) } else { try guest.session.start() }
    guest.session.end(.failed(.ioError))
    #expect(Delay.until { done.load(ordering: .acquiring) == 2 })
    session.withLock { $0 = nil }
  }

  @Test("stop returns when all is told that happened before", arguments: Service.allCases)
  func delivered(service: Service) throws {
    let (told, pool) = (Told(), try pool(service))
    let guest = try Guest(pages: 64, damaged: 0..<64, told.options(), pool)
    #expect(try guest.touch(0..<64))
    guest.session.stop()
    #expect(told.failures.withLock { $0.count } == 64)
  }

  @Test("What a filling finds without anybody who serves is told as well")
  func populated() throws {
    let told = Told()
    let guest = try Guest(pages: 64, damaged: 3..<5, told.options(), nil)
    guest.session.stop()
    #expect(throws: PagerError.self) { try guest.session.populate() }
    #expect(told.failures.withLock { $0.count } == 2)
  }
}
