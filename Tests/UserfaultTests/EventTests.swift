// SPDX-License-Identifier: Apache-2.0

import CTestSupport
import LinuxSystem
import TestSupport
import Testing
import Userfault

@Suite("Events are decoded into what happened")
struct EventTests {
  /// Reads events until one is not a page fault.
  func nextChange(_ userfaultfd: borrowing Userfaultfd) throws -> UserfaultEvent? {
    var events = EventBuffer()
    for _ in 0..<10_000 {
      if try events.read(from: userfaultfd) > 0 { return events.pop() }
      Delay.microseconds(1000)
    }
    return nil
  }

  @Test(
    "A page fault has its access, its thread, and the address to the byte on request",
    arguments: [true, false])
  func pageFault(exact: Bool) throws {
    let memory = try Mapping(anonymous: 2 * 4096)
    let range = memory.range
    let userfaultfd = try Userfaultfd(requiring: exact ? [.threadID, .exactAddress] : .threadID)
    try userfaultfd.register(range, modes: .missing)
    let id = Box<CInt>(0)
    let writer = try ThreadHandle.start {
      id.value = NamedThread.currentID
      store(1, range, offset: 4096 + 128)
    }
    let fault = try #require(try nextFault(userfaultfd))
    #expect(fault.flags == .write)
    #expect(fault.address == range.start.advanced(by: exact ? 4096 + 128 : 4096))
    #expect(fault.threadID == UInt32(bitPattern: id.value))
    #expect(userfaultfd.zeropage(range).obstacle == nil)
    writer.join()
  }

  @Test("madvise is a remove of exactly its range")
  func remove() throws {
    let giver = try Giver(try Mapping(anonymous: 8 * 4096))
    let userfaultfd = try Userfaultfd(requiring: .removeEvents)
    try userfaultfd.register(giver.memory.range, modes: .missing)
    let thread = try ThreadHandle.start {
      try? giver.memory.advise(.dontNeed, offset: 4096, length: 2 * 4096)
    }
    let range = giver.memory.range
    switch try nextChange(userfaultfd) {
    case .remove(let removed):
      #expect(removed == HostRange(start: range.start.advanced(by: 4096), length: 2 * 4096))
    default: Issue.record("no remove event")
    }
    thread.join()
  }

  @Test("While a remove is unread, resolutions say that the mapping is changing")
  func mappingChanging() throws {
    let giver = try Giver(try Mapping(anonymous: 8 * 4096))
    let range = giver.memory.range
    let userfaultfd = try Userfaultfd(requiring: .removeEvents)
    try userfaultfd.register(range, modes: .missing)
    let thread = try ThreadHandle.start {
      try? giver.memory.advise(.dontNeed, offset: 0, length: 4096)
    }
    let last = HostRange(start: range.start.advanced(by: 7 * 4096), length: 4096)
    var seen = false
    for _ in 0..<10_000 where !seen {
      let result = userfaultfd.zeropage(last)
      seen = result.obstacle == .mappingChanging
      if !seen { Delay.microseconds(500) }
    }
    #expect(seen)
    _ = try nextChange(userfaultfd)
    thread.join()
  }

  @Test("munmap is an unmap of exactly its range")
  func unmap() throws {
    let giver = try Giver(try Mapping(anonymous: 8 * 4096))
    let userfaultfd = try Userfaultfd(requiring: .unmapEvents)
    try userfaultfd.register(giver.memory.range, modes: .missing)
    let thread = try ThreadHandle.start {
      try? giver.memory.punchOut(offset: 6 * 4096, length: 2 * 4096)
    }
    let start = giver.memory.range.start.advanced(by: 6 * 4096)
    switch try nextChange(userfaultfd) {
    case .unmap(let range): #expect(range == HostRange(start: start, length: 2 * 4096))
    default: Issue.record("no unmap event")
    }
    thread.join()
  }

  @Test("mremap is a remap from old to new")
  func remap() throws {
    let giver = try Giver(try Mapping(anonymous: 4 * 4096))
    let old = giver.memory.range
    let userfaultfd = try Userfaultfd(requiring: .remapEvents)
    try userfaultfd.register(old, modes: .missing)
    let moved = Box<UInt>(0)
    let thread = try ThreadHandle.start {
      moved.value = ctest_move_mapping(UInt(old.start.rawValue), UInt(old.length))
    }
    let event = try nextChange(userfaultfd)
    thread.join()
    switch event {
    case .remap(let from, let to, let length):
      #expect(from == old.start)
      #expect(to.rawValue == UInt64(moved.value))
      #expect(length == old.length)
    default: Issue.record("no remap event")
    }
    ctest_unmap(moved.value, UInt(old.length))
  }

  @Test("fork gives a userfaultfd of the child", .enabled(if: Host.hasPrivileges, "needs root"))
  func fork() async {
    // In a process of its own: every thread of a forking process matters.
    await #expect(processExitsWith: .success) {
      let memory = try Mapping(anonymous: 4096)
      let userfaultfd = try Userfaultfd(requiring: .forkEvents)
      try userfaultfd.register(memory.range, modes: .missing)
      let thread = try ThreadHandle.start { _ = ctest_fork_and_wait() }
      let event = try EventTests().nextChange(userfaultfd)
      switch consume event {
      case .fork(let child): precondition(child.rawValue > 2)
      default: preconditionFailure("no fork event")
      }
      thread.join()
    }
  }
}

/// A value that one thread writes and another reads after a join or an event.
final class Box<Value: Sendable>: @unchecked Sendable {
  // SAFETY: the event or the join orders the write before the read.
  var value: Value
  init(_ value: Value) { self.value = value }
}

/// A mapping that a thread's closure can hold.
final class Giver: Sendable {
  let memory: Mapping
  init(_ memory: consuming Mapping) throws { self.memory = memory }
}
