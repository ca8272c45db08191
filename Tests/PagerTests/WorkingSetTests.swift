// SPDX-License-Identifier: Apache-2.0

import GuestMemory
import LinuxSystem
import MemoryImage
import Pager
import Synchronization
import TestSupport
import Testing
import Userfault

@Suite("Working sets")
struct PagerWorkingSetTests {
  private func recording(_ kind: MemoryCase, pages: Int) throws -> (
    GuestMemoryHolder, PagerSession<PatternSource>
  ) {
    let memory = try GuestMemoryHolder(kind, pages: pages)
    var options = PagerOptions(faultThreads: 2)
    options.records = true
    let session = try PagerSession(
      userfaultfd: try Userfaultfd(wanting: PagerSession<PatternSource>.features.wanted),
      regions: [try memory.region(kind.mode)], source: PatternSource(), options: options)
    try session.start()
    return (memory, session)
  }

  @Test("The order of first touches is recorded, each page once", arguments: cases)
  func order(kind: MemoryCase) throws {
    let unit = kind.backing.pageSize.bytes / 4096
    let (memory, session) = try recording(kind, pages: unit == 1 ? 512 : 4)
    defer { session.release() }
    let touched = unit == 1 ? [500, 3, 4, 5, 100, 4, 500] : [2, 0, 1, 2]
    for page in touched { _ = load(memory.range, offset: page * unit * 4096) }
    let expected =
      unit == 1
      ? [(500, 1), (3, 3), (100, 1)] : [(2 * unit, unit), (0, 2 * unit)]
    #expect(
      session.recordedWorkingSet
        == expected.map { WorkingSetRun(region: 0, firstBlock: $0.0, blockCount: $0.1) })
  }

  @Test("Recording begins and ends while faults are served", arguments: MemoryCase.smallPages)
  func startAndStop(kind: MemoryCase) throws {
    let served = try ServedMemory(kind, pages: 512, faultAround: .adaptive)
    let session = served.session
    func touch(_ pages: Int...) { #expect(served.wrongBlocks(pages).isEmpty) }
    touch(5)
    #expect(!session.isRecording && !session.hasRecorded && session.recordedWorkingSet.isEmpty)
    try session.startRecording()
    touch(300, 100, 300, 5)
    try session.startRecording()
    #expect(session.isRecording)
    session.stopRecording()
    session.stopRecording()
    touch(200)
    #expect(!session.isRecording && session.hasRecorded)
    try session.startRecording()
    touch(400, 200)
    session.stopRecording()
    let recorded = session.recordedWorkingSet
    #expect(recorded.map(\.firstBlock) == [300, 100, 400])
    #expect(recorded.allSatisfy { $0.blockCount == 1 })
  }

  @Test("Whoever begins and ends a recording all the time harms no page")
  func restless() throws {
    let pages = 16_384
    let served = try ServedMemory(MemoryCase.smallPages[0], pages: pages, threads: 2)
    let running = Atomic<Int>(3)
    try inThreads(4) { thread in
      guard thread > 0 else {
        while running.load(ordering: .acquiring) > 0 {
          try? served.session.startRecording()
          _ = served.session.recordedWorkingSet
          served.session.stopRecording()
        }
        return
      }
      #expect(served.wrongBlocks(stride(from: thread, to: pages, by: 3)).isEmpty)
      running.wrappingSubtract(1, ordering: .releasing)
    }
    let recorded = served.session.recordedWorkingSet
    #expect(recorded.reduce(0) { $0 + $1.blockCount } <= pages)
    #expect(recorded.allSatisfy { $0.firstBlock + $0.blockCount <= pages })
  }

  @Test("A replayed page raises no fault, and its content is right", arguments: cases)
  func replay(kind: MemoryCase) throws {
    let unit = kind.backing.pageSize.bytes / 4096
    let pages = unit == 1 ? 2048 : 6
    let served = try ServedMemory(kind, pages: pages, threads: 1, faultAround: .off)
    let runs = [
      WorkingSetRun(region: 0, firstBlock: unit * pages / 2, blockCount: unit * pages / 4),
      WorkingSetRun(region: 0, firstBlock: 0, blockCount: unit),
      // Not of this session.
      WorkingSetRun(region: 7, firstBlock: 0, blockCount: 100),
      WorkingSetRun(region: 0, firstBlock: unit * pages, blockCount: 100),
    ]
    try served.session.replay(runs)
    #expect(served.session.statistics.faults == 0)
    let blocks = runs[..<2].flatMap { $0.firstBlock..<$0.firstBlock + $0.blockCount }
    #expect(served.wrongBlocks(blocks).isEmpty)
    #expect(served.session.statistics.faults == 0)
    #expect(served.wrongBlocks(0..<served.blocks).isEmpty)
  }

  @Test("Faults go on during a replay, and all content is right", arguments: MemoryCase.smallPages)
  func together(kind: MemoryCase) throws {
    let served = try ServedMemory(kind, pages: 8192, threads: 2)
    try inThreads(3) { thread in
      guard thread == 0 else {
        #expect(served.wrongBlocks(stride(from: thread, to: 8192, by: 5)).isEmpty)
        return
      }
      try? served.session.replay([WorkingSetRun(region: 0, firstBlock: 0, blockCount: 8192)])
    }
    #expect(served.wrongBlocks(0..<8192).isEmpty)
    #expect(served.session.failures.isEmpty)
  }

  @Test("A damaged page of the working set is poisoned, the others come")
  func damage() throws {
    let kind = MemoryCase.smallPages[0]
    let served = try ServedMemory(
      kind, pages: 512, source: PatternSource(damagedBlocks: [100]), threads: 1)
    let error = #expect(throws: PagerError.self) {
      try served.session.replay([WorkingSetRun(region: 0, firstBlock: 0, blockCount: 512)])
    }
    #expect(error?.code == .damagedPages)
    #expect(guardedLoad(served.range, offset: 100 * 4096) == .busError)
    #expect(served.wrongBlocks((0..<512).filter { $0 != 100 }).isEmpty)
  }

  @Test("A stop ends a replay")
  func stopped() throws {
    let kind = MemoryCase.smallPages[0]
    let served = try ServedMemory(
      kind, pages: 65536, source: PatternSource(delay: 1000), threads: 1)
    try inThreads(2) { thread in
      if thread == 0 {
        try? served.session.replay([WorkingSetRun(region: 0, firstBlock: 0, blockCount: 65536)])
      } else {
        Delay.microseconds(30_000)
        served.session.stop()
      }
    }
    #expect(served.session.statistics.populatedPages < 65536)
  }
}

/// Memory with what a region is made from.
private final class GuestMemoryHolder: Sendable {
  private let memory: GuestMemoryObject
  var range: HostRange { memory.range }

  init(_ kind: MemoryCase, pages: Int) throws {
    memory = try GuestMemoryObject(
      backing: kind.backing, length: pages * kind.backing.pageSize.bytes)
  }

  func region(_ mode: ResolutionMode) throws -> PagedRegion { try PagedRegion(memory, mode: mode) }
}
