// SPDX-License-Identifier: Apache-2.0

import CTestSupport
import Glibc
import GuestMemory
import LinuxSystem
import Pager
import Synchronization
import SystemPackage
import TestSupport
import Testing
import Userfault

@Suite(
  "Parts of huge pages that are given back",
  .enabled(if: Host.hasHugePages(8), "needs 8 free pages of 2 MiB"))
struct PartialRemovalTests {
  private static let pageBytes = PageSize.size2MiB.bytes

  /// Shared huge pages, of which the kernel gives back parts too (MADV_REMOVE), and a source that a
  /// test can hold up.
  private final class Subject: Sendable {
    let memory: GuestMemoryObject
    let region: PagedRegion
    let session: PagerSession<HookedSource>
    let isHeld: Held

    final class Held: Sendable {
      let value = Atomic<Bool>(false)
      let reads = Atomic<Int>(0)
    }

    init(_ mode: ResolutionMode, pages: Int = 2) throws {
      memory = try GuestMemoryObject(backing: .hugetlb(.size2MiB), length: pages * pageBytes)
      region = try PagedRegion(memory, mode: mode)
      let held = Held()
      isHeld = held
      session = try PagerSession(
        userfaultfd: try Userfaultfd(wanting: PagerSession<HookedSource>.features.wanted),
        regions: [region],
        source: HookedSource { _ in
          held.reads.wrappingAdd(1, ordering: .relaxed)
          while held.value.load(ordering: .acquiring) { Delay.microseconds(200) }
        })
      try session.start()
    }

    deinit { session.release() }

    func remove(_ blocks: Range<Int>) throws {
      let events = session.statistics.removeEvents
      try memory.mapping.advise(
        .remove, offset: blocks.lowerBound * 4096, length: blocks.count * 4096)
      // madvise returns when the event was read, which is a moment before it is counted.
      _ = Delay.until { session.statistics.removeEvents > events }
    }

    /// Blocks that are not as they must be.
    func wrong(removed: Set<Int>) -> [Int] {
      (0..<memory.range.length / 4096).filter { block in
        let right = removed.contains(block) ? 0 : HookedSource.expected(block: block)
        return load(memory.range, offset: block * 4096) != right
          || load(memory.range, offset: block * 4096 + 4088) != right
      }
    }
  }

  @Test(
    "The rest of a page keeps its content, whether it is there already or not",
    arguments: [ResolutionMode.missing, .minor], [false, true])
  func rest(mode: ResolutionMode, isThere: Bool) throws {
    let subject = try Subject(mode)
    if isThere { #expect(subject.wrong(removed: []).isEmpty) }
    // The last block of the first page; some across the border of two pages, which is two parts.
    try subject.remove(511..<512)
    try subject.remove(3..<5)
    #expect(subject.wrong(removed: [511, 3, 4]).isEmpty)
    #expect(subject.session.failures.isEmpty)
  }

  @Test(
    "An event that covers a page, and parts of its neighbours, gives up just that",
    arguments: [ResolutionMode.missing, .minor])
  func across(mode: ResolutionMode) throws {
    let subject = try Subject(mode, pages: 3)
    try subject.remove(500..<1030)
    #expect(subject.wrong(removed: Set(500..<1030)).isEmpty)
    #expect(subject.region.states.load(1) == .removed || subject.region.states.load(1) == .present)
  }

  @Test(
    "Pieces that come one after the other give up the whole page",
    arguments: [ResolutionMode.missing, .minor])
  func pieces(mode: ResolutionMode) throws {
    let subject = try Subject(mode)
    for block in (0..<512).reversed() { try subject.remove(block..<block + 1) }
    #expect(subject.region.states.load(0) == .removed)
    #expect(load(subject.memory.range, offset: 0) == 0)
    // Nothing had to be read for it.
    #expect(subject.isHeld.reads.load(ordering: .relaxed) == 0)
    #expect(subject.wrong(removed: Set(0..<512)).isEmpty)
  }

  @Test(
    "A part that is given back while its page is being read is zero in it",
    arguments: [ResolutionMode.missing, .minor])
  func whileReading(mode: ResolutionMode) throws {
    let subject = try Subject(mode)
    subject.isHeld.value.store(true, ordering: .releasing)
    let toucher = try ThreadHandle.start { _ = load(subject.memory.range, offset: 0) }
    #expect(Delay.until { subject.isHeld.reads.load(ordering: .relaxed) > 0 })
    try subject.remove(7..<9)
    subject.isHeld.value.store(false, ordering: .releasing)
    toucher.join()
    #expect(subject.wrong(removed: [7, 8]).isEmpty)
  }

  @Test("So it is in what is filled behind the guest", arguments: [ResolutionMode.missing, .minor])
  func filled(mode: ResolutionMode) throws {
    let subject = try Subject(mode)
    try subject.remove(100..<140)
    try subject.session.populate()
    #expect(subject.session.letGo() == .complete)
    #expect(subject.wrong(removed: Set(100..<140)).isEmpty)
  }

  @Test("The kernel neither unmaps nor moves parts of huge pages")
  func kernel() throws {
    let memory = try GuestMemoryObject(backing: .hugetlb(.size2MiB), length: Self.pageBytes)
    let start = UInt(memory.range.start.rawValue) + 4096
    #expect(ctest_move_mapping(start, 4096) == 0)
    #expect(throws: Errno.invalidArgument) {
      try memory.mapping.punchOut(offset: 4096, length: 4096)
    }
  }
}
