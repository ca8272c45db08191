// SPDX-License-Identifier: Apache-2.0

import GuestMemory
import LinuxSystem
import Pager
import Synchronization
import TestSupport
import Testing
import Userfault

@Suite("A userfaultfd that its owner has too")
struct SharedDescriptorTests {
  @Test("An owner that makes it wait holds up nobody", arguments: [false, true])
  func blocking(isPooled: Bool) throws {
    let pool = try PagerPool(threads: 1, capacity: 2)
    let memory = try GuestMemoryObject(backing: .anonymous, length: 2048 * 4096)
    let userfaultfd = try Userfaultfd(wanting: PagerSession<PatternSource>.features.wanted)
    let copy = try userfaultfd.descriptor.duplicate()
    let session = try PagerSession(
      userfaultfd: userfaultfd, regions: [try PagedRegion(memory, mode: .missing)],
      source: PatternSource())
    if isPooled { try session.start(in: pool) } else { try session.start() }
    let other = try ServedMemory(MemoryCase.all[0], pages: 2048, pool: isPooled ? pool : nil)
    let isDone = Atomic<Bool>(false)
    let range = memory.range
    try inThreads(3) { thread in
      switch thread {
      case 0:
        while !isDone.load(ordering: .acquiring) {
          try? copy.setNonBlocking(false)
          Delay.microseconds(50)
        }
      case 1:
        for block in 0..<2048 {
          let found = load(range, offset: block * 4096)
          if found != PatternSource.word(block: block, seed: 7) { Issue.record("block \(block)") }
        }
        isDone.store(true, ordering: .releasing)
      default:
        if !other.wrongBlocks(0..<2048).isEmpty { Issue.record("the other guest") }
      }
    }
    #expect(!session.hasEnded)
    session.release()
    other.session.release()
    pool.stop()
  }

  @Test(
    "Memory that its owner write-protects is not served for ever: the session ends, and says why")
  func writeProtection() throws {
    let memory = try GuestMemoryObject(backing: .anonymous, length: 16 * 4096)
    let reason = Mutex<String>("")
    let userfaultfd = try Userfaultfd(
      requiring: [.writeProtectFaults], wanting: PagerSession<PatternSource>.features.wanted)
    try userfaultfd.register(memory.range, modes: [.missing, .writeProtect])
    let owner = try Userfaultfd(
      adopting: userfaultfd.descriptor.duplicate(), features: userfaultfd.features)
    let session = try PagerSession(
      userfaultfd: userfaultfd, regions: [try PagedRegion(memory, mode: .missing)],
      source: PatternSource(),
      options: PagerOptions(onEnd: { error in reason.withLock { $0 = error.description } }),
      registers: false)
    try session.start()
    #expect(load(memory.range, offset: 0) == PatternSource.word(block: 0, seed: 7))
    try owner.writeProtect(HostRange(start: memory.range.start, length: 4096), enabled: true)
    let range = memory.range
    let writer = try ThreadHandle.start { store(5, range, offset: 0) }
    #expect(Delay.until { session.hasEnded })
    #expect(Delay.until { reason.withLock { $0.contains("write-protected") } })
    // What was not there is an error, and who waits goes on.
    #expect(session.letGo() == .missing(pages: 15))
    writer.join()
    #expect(load(range, offset: 0) == 5)
    #expect(guardedLoad(range, offset: 4096) == .busError)
  }
}
