// SPDX-License-Identifier: Apache-2.0

import Glibc
import GuestMemory
import LinuxSystem
import Pager
import Synchronization
import TestSupport
import Testing
import Userfault

@Suite("Memory that is given back or unmapped while it is served")
struct ChangingMappingTests {
  @Test(
    "After madvise a page never shows the source's content again",
    arguments: [MemoryCase.all[0]])
  func dontNeed(kind: MemoryCase) throws {
    let guest = try ServedMemory(kind, pages: 256)
    for block in 0..<256 {
      #expect(load(guest.range, offset: block * 4096) == guest.source.expected(block: block))
    }
    try guest.memory.mapping.advise(.dontNeed, offset: 0, length: 128 * 4096)
    for block in 0..<128 { #expect(load(guest.range, offset: block * 4096) == 0) }
    for block in 128..<256 {
      #expect(load(guest.range, offset: block * 4096) == guest.source.expected(block: block))
    }
    #expect(guest.session.statistics.removeEvents == 1)
  }

  @Test("A page given back before its first touch reads as zero", arguments: MemoryCase.smallPages)
  func removedBeforeFirstTouch(kind: MemoryCase) throws {
    let guest = try ServedMemory(kind, pages: 64)
    let advice: MemoryAdvice = kind.backing == .anonymous ? .dontNeed : .remove
    try guest.memory.mapping.advise(advice, offset: 0, length: 32 * 4096)
    for block in 0..<32 { #expect(load(guest.range, offset: block * 4096) == 0) }
    #expect(guest.wrongBlocks(32..<64).isEmpty)
  }

  @Test("A hole punched into shared memory reads as zero", arguments: MemoryCase.memfd)
  func removeShared(kind: MemoryCase) throws {
    let guest = try ServedMemory(kind, pages: 64)
    #expect(guest.wrongBlocks(0..<64).isEmpty)
    try guest.memory.mapping.advise(.remove, offset: 0, length: 64 * 4096)
    for block in 0..<64 { #expect(load(guest.range, offset: block * 4096) == 0) }
  }

  @Test("MADV_DONTNEED on shared memory keeps what was written", arguments: MemoryCase.memfd)
  func dontNeedShared(kind: MemoryCase) throws {
    let guest = try ServedMemory(kind, pages: 64)
    for block in 0..<64 { store(UInt64(block) + 1000, guest.range, offset: block * 4096) }
    try guest.memory.mapping.advise(.dontNeed, offset: 0, length: 64 * 4096)
    for block in 0..<64 { #expect(load(guest.range, offset: block * 4096) == UInt64(block) + 1000) }
  }

  @Test(
    "MADV_DONTNEED on shared memory that is not filled yet gives it up, as MADV_REMOVE does",
    arguments: MemoryCase.memfd)
  func dontNeedSharedUnfilled(kind: MemoryCase) throws {
    let guest = try ServedMemory(kind, pages: 64)
    try guest.memory.mapping.advise(.dontNeed, offset: 0, length: 32 * 4096)
    for block in 0..<32 { #expect(load(guest.range, offset: block * 4096) == 0) }
    #expect(guest.wrongBlocks(32..<64).isEmpty)
  }

  @Test("Without remove events a page dropped by madvise reads as zero")
  func dontNeedWithoutEvents() throws {
    let guest = try ServedMemory(MemoryCase.all[0], pages: 64, without: .removeEvents)
    #expect(guest.wrongBlocks(0..<64).isEmpty)
    try guest.memory.mapping.advise(.dontNeed, offset: 0, length: 64 * 4096)
    for block in 0..<64 { #expect(load(guest.range, offset: block * 4096) == 0) }
  }

  /// One thread gives pages back, the others read them: a page is the source's or zero,
  /// and once the giver has seen it zero it stays so.
  @Test(
    "A storm of madvise against faults", arguments: MemoryCase.smallPages, [0, 200] as [UInt32])
  func storm(kind: MemoryCase, delay: UInt32) throws {
    let pages = delay == 0 ? 2048 : 256
    let guest = try ServedMemory(kind, pages: pages, source: PatternSource(delay: delay))
    let advice: MemoryAdvice = kind.backing == .anonymous ? .dontNeed : .remove
    let wrong = Atomic<Int>(0)
    let isDone = Atomic<Bool>(false)
    try inThreads(4) { thread in
      guard thread == 0 else {
        var block = thread
        while !isDone.load(ordering: .relaxed) {
          let value = load(guest.range, offset: block * 4096)
          if value != 0, value != guest.source.expected(block: block) {
            wrong.wrappingAdd(1, ordering: .relaxed)
          }
          block = (block + 3) % pages
        }
        return
      }
      for first in stride(from: 0, to: pages, by: 4) {
        let given = first..<min(first + 4, pages)
        do {
          try guest.memory.mapping.advise(
            advice, offset: first * 4096, length: given.count * 4096)
        } catch {
          wrong.wrappingAdd(1000, ordering: .relaxed)
        }
        for block in given where load(guest.range, offset: block * 4096) != 0 {
          wrong.wrappingAdd(1, ordering: .relaxed)
        }
      }
      isDone.store(true, ordering: .relaxed)
    }
    #expect(wrong.load(ordering: .relaxed) == 0)
    #expect(guest.session.failures.isEmpty)
  }

  /// The sleeper finds no mapping any more, which is SIGSEGV; asleep for ever it would
  /// leave the process to end by itself, with success.
  @Test("A thread that waits for a page that is unmapped is woken")
  func unmapWakes() async {
    await #expect(processExitsWith: .signal(SIGSEGV)) {
      let guest = try ServedMemory(
        MemoryCase.all[0], pages: 64, source: PatternSource(delay: 100_000))
      let sleeper = try ThreadHandle.start { _ = load(guest.range, offset: 8 * 4096) }
      Delay.microseconds(30_000)
      try guest.memory.mapping.punchOut(offset: 0, length: 32 * 4096)
      Delay.microseconds(3_000_000)
      withExtendedLifetime(sleeper) {}
      exit(0)
    }
  }

  @Test(
    "munmap during faults ends neither the session nor other pages",
    arguments: MemoryCase.smallPages)
  func unmap(kind: MemoryCase) throws {
    let guest = try ServedMemory(kind, pages: 1024, source: PatternSource(delay: 20))
    let wrong = Atomic<Int>(0)
    try inThreads(3) { thread in
      if thread == 0 {
        for first in stride(from: 512, to: 1024, by: 16) {
          try? guest.memory.mapping.punchOut(offset: first * 4096, length: 16 * 4096)
        }
      } else {
        let order = stride(from: thread - 1, to: 512, by: 2)
        wrong.wrappingAdd(guest.wrongBlocks(order).count, ordering: .relaxed)
      }
    }
    #expect(wrong.load(ordering: .relaxed) == 0)
    #expect(guest.session.statistics.unmapEvents == 32)
    #expect(!guest.session.hasEnded)
  }
}
