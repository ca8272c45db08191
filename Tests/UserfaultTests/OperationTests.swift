// SPDX-License-Identifier: Apache-2.0

import CTestSupport
import LinuxSystem
import Synchronization
import SystemPackage
import TestSupport
import Testing
import Userfault

/// A page's worth of one byte, kept for a test.
func withPage<Value>(
  of byte: UInt8, pages: Int = 1, _ body: (UnsafeRawPointer) throws -> Value
) rethrows -> Value {
  let bytes = [UInt8](repeating: byte, count: pages * 4096)
  return try unsafe bytes.withUnsafeBytes { try unsafe body($0.baseAddress.unsafelyUnwrapped) }
}

@Suite("Each ioctl says what it did, and how far it came")
struct OperationTests {
  @Test("copy fills an absent page once; again it is already present")
  func copy() throws {
    let memory = try Mapping(anonymous: 4 * 4096)
    let userfaultfd = try Userfaultfd()
    let offered = try userfaultfd.register(memory.range, modes: .missing)
    #expect(offered.isSuperset(of: [.wake, .copy, .zeropage]))
    unsafe withPage(of: 0x5a) { page in
      let first = unsafe userfaultfd.copy(from: page, to: memory.range.start, length: 4096)
      #expect(first == Resolution(bytesDone: 4096))
      let second = unsafe userfaultfd.copy(from: page, to: memory.range.start, length: 4096)
      #expect(second == Resolution(bytesDone: 0, obstacle: .alreadyPresent))
    }
    #expect(load(memory.range, offset: 0) == 0x5a5a_5a5a_5a5a_5a5a)
  }

  @Test("A copy that meets a present page keeps what came before it")
  func partialCopy() throws {
    let memory = try Mapping(anonymous: 4 * 4096)
    let userfaultfd = try Userfaultfd()
    try userfaultfd.register(memory.range, modes: .missing)
    let third = HostRange(start: memory.range.start.advanced(by: 2 * 4096), length: 4096)
    #expect(userfaultfd.zeropage(third) == Resolution(bytesDone: 4096))
    unsafe withPage(of: 0x11, pages: 4) { pages in
      let result = unsafe userfaultfd.copy(from: pages, to: memory.range.start, length: 4 * 4096)
      #expect(result == Resolution(bytesDone: 2 * 4096, obstacle: .partial))
    }
    #expect(load(memory.range, offset: 4096) == 0x1111_1111_1111_1111)
    #expect(load(memory.range, offset: 2 * 4096) == 0)
  }

  @Test("copy outside of a registered range is not registered")
  func copyUnregistered() throws {
    let memory = try Mapping(anonymous: 4096)
    let userfaultfd = try Userfaultfd()
    unsafe withPage(of: 1) { page in
      let result = unsafe userfaultfd.copy(from: page, to: memory.range.start, length: 4096)
      #expect(result == Resolution(bytesDone: 0, obstacle: .notRegistered))
    }
  }

  @Test("continue maps what the page cache has, and says when it has nothing")
  func continueMapsCachedPages() throws {
    let file = try MemoryFile(name: "test", length: 2 * 4096)
    let memory = try Mapping(of: file)
    let alias = try Mapping(of: file)
    let userfaultfd = try Userfaultfd()
    let offered = try userfaultfd.register(memory.range, modes: [.missing, .minor])
    #expect(offered.contains(.continue))
    store(77, alias.range, offset: 0)
    let first = HostRange(start: memory.range.start, length: 4096)
    #expect(userfaultfd.continue(first) == Resolution(bytesDone: 4096))
    #expect(userfaultfd.continue(first) == Resolution(bytesDone: 0, obstacle: .alreadyPresent))
    let second = HostRange(start: first.end, length: 4096)
    #expect(userfaultfd.continue(second) == Resolution(bytesDone: 0, obstacle: .absent))
    #expect(load(memory.range, offset: 0) == 77)
  }

  @Test(
    "A poisoned page raises SIGBUS",
    .enabled(if: Host.has(.poison), "needs UFFDIO_POISON (Linux 6.6)"))
  func poison() throws {
    let memory = try Mapping(anonymous: 4096)
    let userfaultfd = try Userfaultfd(requiring: .poison)
    try userfaultfd.register(memory.range, modes: .missing)
    #expect(userfaultfd.poison(memory.range) == Resolution(bytesDone: 4096))
    #expect(guardedLoad(memory.range, offset: 0) == .busError)
  }

  @Test(
    "move takes the page away from its source; a hole is not registered unless allowed",
    .enabled(if: Host.has(.move), "needs UFFDIO_MOVE (Linux 6.8)"))
  func move() throws {
    let source = try Mapping(anonymous: 2 * 4096)
    let target = try Mapping(anonymous: 2 * 4096)
    store(99, source.range, offset: 0)
    let userfaultfd = try Userfaultfd(requiring: .move)
    try userfaultfd.register(target.range, modes: .missing)
    let moved = userfaultfd.move(from: source.range.start, to: target.range.start, length: 4096)
    #expect(moved == Resolution(bytesDone: 4096))
    #expect(load(target.range, offset: 0) == 99)
    #expect(load(source.range, offset: 0) == 0)
    let hole = source.range.start.advanced(by: 4096)
    let next = target.range.start.advanced(by: 4096)
    #expect(
      userfaultfd.move(from: hole, to: next, length: 4096).obstacle == .notRegistered)
    #expect(
      userfaultfd.move(from: hole, to: next, length: 4096, allowHoles: true).obstacle == nil)
  }

  @Test("Lifting a write protection lets the writer go on")
  func writeProtect() throws {
    let memory = try Mapping(anonymous: 4096)
    store(1, memory.range, offset: 0)
    let userfaultfd = try Userfaultfd(requiring: .writeProtectFaults)
    try userfaultfd.register(memory.range, modes: .writeProtect)
    try userfaultfd.writeProtect(memory.range, enabled: true)
    let range = memory.range
    let writer = try ThreadHandle.start { store(2, range, offset: 0) }
    let fault = try #require(try nextFault(userfaultfd))
    #expect(fault.flags == [.write, .writeProtect])
    #expect(load(memory.range, offset: 0) == 1)
    try userfaultfd.writeProtect(memory.range, enabled: false)
    writer.join()
    #expect(load(memory.range, offset: 0) == 2)
  }

  @Test("A copy with write protection traps the first write")
  func copyWriteProtected() throws {
    let memory = try Mapping(anonymous: 4096)
    let userfaultfd = try Userfaultfd(requiring: .writeProtectFaults)
    try userfaultfd.register(memory.range, modes: [.missing, .writeProtect])
    unsafe withPage(of: 3) { page in
      let done = unsafe userfaultfd.copy(
        from: page, to: memory.range.start, length: 4096, writeProtected: true)
      #expect(done.obstacle == nil)
    }
    let range = memory.range
    let writer = try ThreadHandle.start { store(4, range, offset: 0) }
    #expect(try nextFault(userfaultfd)?.flags.contains(.writeProtect) == true)
    try userfaultfd.writeProtect(memory.range, enabled: false)
    writer.join()
  }

  @Test("A copy that does not wake leaves the waiter asleep until wake")
  func withoutWaking() throws {
    let memory = try Mapping(anonymous: 4096)
    let userfaultfd = try Userfaultfd()
    try userfaultfd.register(memory.range, modes: .missing)
    let range = memory.range
    let reader = try ReaderProbe(range)
    _ = try nextFault(userfaultfd)
    unsafe withPage(of: 3) { page in
      _ = unsafe userfaultfd.copy(from: page, to: range.start, length: 4096, wakes: false)
    }
    Delay.microseconds(20_000)
    #expect(!reader.isDone)
    try userfaultfd.wake(range)
    #expect(Delay.until { reader.isDone })
  }

  @Test("unregister also wakes those who wait on a MINOR-only range")
  func unregisterMinor() throws {
    let file = try MemoryFile(name: "test", length: 4096)
    let memory = try Mapping(of: file)
    let alias = try Mapping(of: file)
    store(5, alias.range, offset: 0)
    let userfaultfd = try Userfaultfd()
    try userfaultfd.register(memory.range, modes: .minor)
    let reader = try ReaderProbe(memory.range)
    #expect(try nextFault(userfaultfd)?.flags.contains(.minor) == true)
    try userfaultfd.unregister(memory.range)
    #expect(Delay.until { reader.isDone })
  }

  @Test("RWP is refused by name where the kernel lacks it")
  func readWriteProtect() throws {
    let supported = try Userfaultfd.supportedFeatures()
    guard !supported.contains(.readWriteProtect) else {
      let memory = try Mapping(anonymous: 4096)
      store(1, memory.range, offset: 0)
      let userfaultfd = try Userfaultfd(requiring: .readWriteProtect)
      try userfaultfd.register(memory.range, modes: .readWriteProtect)
      try userfaultfd.readWriteProtect(memory.range, enabled: true)
      let reader = try ReaderProbe(memory.range)
      #expect(try nextFault(userfaultfd)?.flags.contains(.readWriteProtect) == true)
      try userfaultfd.readWriteProtect(memory.range, enabled: false)
      #expect(Delay.until { reader.isDone })
      return
    }
    let refused = #expect(throws: UserfaultError.self) {
      _ = try Userfaultfd(requiring: .readWriteProtect)
    }
    #expect(refused?.code == .missingFeatures)
    #expect(refused?.description.contains("RWP") == true)
  }
}

/// Waits for the next event and expects a fault.
func nextFault(_ userfaultfd: borrowing Userfaultfd) throws -> PageFault? {
  var events = EventBuffer()
  for _ in 0..<10_000 {
    if try events.read(from: userfaultfd) > 0 { break }
    Delay.microseconds(1000)
  }
  while let event = events.pop() {
    if case .pageFault(let fault) = event { return fault }
  }
  return nil
}

/// A thread that reads one word, and whether it is through.
final class ReaderProbe: Sendable {
  private let done: Flag
  private let thread: ThreadHandle

  final class Flag: Sendable { let value = Atomic<Bool>(false) }

  init(_ range: HostRange) throws {
    let done = Flag()
    self.done = done
    thread = try ThreadHandle.start {
      _ = load(range, offset: 0)
      done.value.store(true, ordering: .releasing)
    }
  }

  deinit { thread.join() }
  var isDone: Bool { done.value.load(ordering: .acquiring) }
}
