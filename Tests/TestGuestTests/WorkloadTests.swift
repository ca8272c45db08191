// SPDX-License-Identifier: Apache-2.0

import LinuxSystem
import TestGuest
import TestSupport
import Testing

@Suite struct WorkloadTests {
  @Test(
    "A guest finds the content that it filled, in any order", .timeLimit(.minutes(10)),
    arguments: kinds, [(2, 1), (2, 3), (64, 1), (64, 2)])
  func fillAndVerify(_ kind: TestGuest.Kind, _ size: (mebibytes: Int, vcpus: Int)) throws {
    let memory = try Memory(mebibytes: size.mebibytes)
    let guest = try TestGuest(booting: memory.range, vcpus: size.vcpus, kind: kind)
    let pages = UInt64(size.mebibytes * 256 - 256)
    let filled = try guest.run(.fill(seed: 7))
    #expect(filled.pages == pages)
    for order in [PageOrder.sequential, .random] {
      let report = try guest.run(.verify(seed: 7, order: order))
      #expect(report.pages == pages)
      #expect(report.wrongPages == 0)
      #expect(report.firstWrongPage == nil)
    }
    #expect(try guest.run(.verify(seed: 8)).wrongPages > pages / 2)
    guest.shutdown()
  }

  @Test("One flipped byte is one wrong page, and named", arguments: kinds)
  func corruption(_ kind: TestGuest.Kind) throws {
    let memory = try Memory(mebibytes: 8)
    let guest = try TestGuest(booting: memory.range, vcpus: 2, kind: kind)
    _ = try guest.run(.fill(seed: 3))
    for offset in [1 << 20, 5 << 20 | 0x123, (8 << 20) - 1] {
      memory.flipByte(at: offset)
      let report = try guest.run(.verify(seed: 3, order: .random))
      #expect(report.wrongPages == 1)
      #expect(report.firstWrongPage == offset / 4096)
      memory.flipByte(at: offset)
    }
    #expect(try guest.run(.verify(seed: 3)).wrongPages == 0)
  }
}
