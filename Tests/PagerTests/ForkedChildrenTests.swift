// SPDX-License-Identifier: Apache-2.0

import Foundation
import LinuxSystem
import Synchronization
import TestSupport
import Testing
import Userfault

@testable import Pager

/// In processes of their own: they count descriptors, or use them up.
@Suite(
  "Children of a guest's process never read zeros for content",
  .enabled(if: Host.hasPrivileges, "FORK events need CAP_SYS_PTRACE"),
  .enabled(if: Host.has(.poison), "needs UFFDIO_POISON (Linux 6.6)"))
struct ForkedChildrenTests {
  @Test("Many children take few descriptors and one thread, children of children too")
  func bounded() async {
    await #expect(processExitsWith: .success) {
      for (isPooled, depth) in [(false, 0), (true, 0), (false, 1), (true, 1)] {
        try Forking.run(isPooled, forks: (count: 100, depth: depth)) { forking in
          try forking.guest.awaitForks()
          // Those that are watched, and those that wait for it.
          let isBounded = Delay.until { openDescriptors(of: "userfaultfd") - forking.before <= 64 }
          check(isBounded, "\(openDescriptors(of: "userfaultfd")) descriptors")
          check(Host.threads(named: "forkedchildren") == 1, "more than one thread")
          let answer = try forking.guest.readInForks()
          check(answer == [0, 0], "zeros and lost children: \(answer)")
          let wrong = try forking.guest.wrongWords()
          check(wrong == 0, "\(wrong ?? -1) wrong words in the parent")
        }
      }
    }
  }

  @Test("Those that are there when the session ends get errors")
  func ended() async {
    await #expect(processExitsWith: .success) {
      for (isPooled, depth) in [(false, 0), (true, 1)] {
        try Forking.run(isPooled, forks: (count: 5, depth: depth)) { forking in
          try forking.guest.awaitForks()
          forking.session.release()
          let answer = try forking.guest.readInForks()
          check(answer == [0, 0], "zeros and lost children: \(answer)")
          let isOver = Delay.until { Host.threads(named: "forkedchildren") == 0 }
          check(isOver, "the thread stays")
        }
      }
    }
  }

  @Test("At the descriptor limit a fork ends no session, and its child reads no zeros")
  func noDescriptors() async {
    await #expect(processExitsWith: .success) {
      for isPooled in [false, true] {
        try Forking.run(isPooled, forks: (count: 5, depth: 0), goes: false) { forking in
          let taken = Descriptors()
          check(taken.takeAll() > 0)
          try forking.guest.go()
          try forking.guest.awaitForks()
          let answer = try forking.guest.readInForks()
          check(answer == [0, 0], "zeros and lost children: \(answer)")
          let wrong = try forking.guest.wrongWords()
          check(wrong == 0, "\(wrong ?? -1) wrong words in the parent")
          check(!forking.session.hasEnded)
          taken.letGo()
        }
      }
    }
  }

  @Test(
    "A fork that waits for a descriptor costs little, holds up no other session, and is taken later"
  )
  func waiting() async {
    await #expect(processExitsWith: .success) {
      for isPooled in [false, true] {
        try Forking.run(isPooled, forks: (count: 1, depth: 0), goes: false) { forking in
          let other = try ServedMemory(
            MemoryCase.all[0], pages: 256, threads: 1, pool: forking.pool)
          let taken = Descriptors()
          taken.takeAll()
          // Also the one in reserve, which the session would have back at once.
          let hasAll = Delay.until {
            _ = forking.session.children?.makeRoom()
            return taken.takeAll() > 0
          }
          check(hasAll, "the descriptor in reserve was not had")
          try forking.guest.go()
          Delay.microseconds(100_000)
          let before = processorTime()
          Delay.microseconds(500_000)
          let used = processorTime() - before
          check(used < 0.15, "\(used) s of half a second")
          check(other.wrongBlocks(0..<256).isEmpty)
          check(!forking.session.hasEnded)
          check(forking.session.statistics.forkEvents == 0, "it was not the limit")
          taken.letGo()
          try forking.guest.awaitForks()
          let answer = try forking.guest.readInForks()
          check(answer == [0, 0], "zeros and lost children: \(answer)")
        }
      }
    }
  }
}

/// A process that forks, and the session that serves it.
private struct Forking {
  let guest: GuestProcess
  let session: PagerSession<PatternSource>
  let pool: PagerPool?
  /// Descriptors of userfaultfds without children.
  let before: Int

  static func run(
    _ isPooled: Bool, forks: (count: Int, depth: Int), goes: Bool = true,
    _ body: (Forking) throws -> Void
  ) throws {
    // A child that nobody takes would have its parent wait for ever.
    alarm(900)
    let guest = try GuestProcess(pages: 64, threads: 1, forks: forks)
    let session = try guest.session(PatternSource())
    let pool = isPooled ? try PagerPool(threads: 1) : nil
    let before = openDescriptors(of: "userfaultfd")
    if let pool { try session.start(in: pool) } else { try session.start() }
    if goes { try guest.go() }
    try body(Forking(guest: guest, session: session, pool: pool, before: before))
    guest.kill()
    session.release()
    pool?.stop()
  }
}

/// All the descriptors that this process may have.
private final class Descriptors {
  private var taken: [CInt] = []
  private var limit = rlimit()

  init() {
    let openFiles = __rlimit_resource_t(RLIMIT_NOFILE.rawValue)
    unsafe getrlimit(openFiles, &limit)
    var few = limit
    few.rlim_cur = 200
    unsafe setrlimit(openFiles, &few)
  }

  /// How many there were.
  @discardableResult
  func takeAll() -> Int {
    let before = taken.count
    while true {
      let descriptor = dup(0)
      guard descriptor >= 0 else { return taken.count - before }
      taken.append(descriptor)
    }
  }

  func letGo() {
    for descriptor in taken { close(descriptor) }
    taken = []
    unsafe setrlimit(__rlimit_resource_t(RLIMIT_NOFILE.rawValue), &limit)
  }
}

/// Ends the process, with words, unless something holds.
private func check(_ condition: Bool, _ words: String = "a condition does not hold") {
  guard !condition else { return }
  FileHandle.standardError.write(Data((words + "\n").utf8))
  exit(1)
}
