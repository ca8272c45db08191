// SPDX-License-Identifier: Apache-2.0

import GuestMemory
import LinuxSystem
import Pager
import TestSupport
import Testing

@Suite("Fault-around")
struct FaultAroundTests {
  private static let pages = 4096

  @Test(
    "A guest that goes upwards faults on few of its pages, and all are right",
    arguments: MemoryCase.smallPages, [1, 2])
  func upwards(kind: MemoryCase, threads: Int) throws {
    let served = try ServedMemory(kind, pages: Self.pages, threads: threads)
    #expect(served.wrongBlocks(0..<Self.pages).isEmpty)
    let counts = served.session.statistics
    #expect(counts.faults < UInt64(Self.pages / 2), "\(counts.faults) faults")
    #expect(counts.broughtAlong > UInt64(Self.pages / 2))
  }

  @Test("Switched off, each page comes by its own fault", arguments: MemoryCase.smallPages)
  func off(kind: MemoryCase) throws {
    let served = try ServedMemory(kind, pages: 512, threads: 1, faultAround: .off)
    #expect(served.wrongBlocks(0..<512).isEmpty)
    #expect(served.session.statistics.faults >= 512)
    #expect(served.session.statistics.broughtAlong == 0)
  }

  @Test(
    "A guest that goes at random brings little that it does not touch",
    arguments: MemoryCase.smallPages)
  func random(kind: MemoryCase) throws {
    let served = try ServedMemory(kind, pages: Self.pages, threads: 1)
    // Every 37th page, in an order without neighbours.
    let touched = (0..<100).map { $0 * 1657 % Self.pages }
    #expect(served.wrongBlocks(touched).isEmpty)
    #expect(served.session.statistics.broughtAlong < 20)
  }

  @Test(
    "A damaged page further up harms nobody before it is touched", arguments: MemoryCase.smallPages)
  func damage(kind: MemoryCase) throws {
    let served = try ServedMemory(
      kind, pages: Self.pages, source: PatternSource(damagedBlocks: [1000]), threads: 1)
    for block in 0..<Self.pages {
      let value = guardedLoad(served.range, offset: block * 4096)
      if block == 1000, served.session.failures.count > 0 {
        #expect(value == .busError)
      } else if block != 1000 {
        #expect(value == .value(served.source.expected(block: block)))
      }
    }
    #expect(served.session.failures.count == 1)
  }

  @Test(
    "What is given back while neighbours come along reads as zero", arguments: MemoryCase.smallPages
  )
  func removals(kind: MemoryCase) throws {
    for round in 0..<8 {
      let served = try ServedMemory(kind, pages: Self.pages, threads: 1 + round % 2)
      let range = served.range
      // A walker goes up; somebody else gives back every fourth group of 16 pages, and a
      // page that was given back never has the source's content again.
      try inThreads(2) { thread in
        if thread == 0 {
          for block in 0..<Self.pages { _ = load(range, offset: block * 4096) }
        } else {
          for group in stride(from: 0, to: Self.pages / 16, by: 4) {
            try? served.memory.mapping.advise(
              kind.backing == .anonymous ? .dontNeed : .remove, offset: group * 65536,
              length: 65536)
          }
        }
      }
      for block in 0..<Self.pages {
        let value = load(range, offset: block * 4096)
        let isGivenBack = block / 16 % 4 == 0
        #expect(value == (isGivenBack ? 0 : served.source.expected(block: block)), "\(block)")
      }
    }
  }
}
