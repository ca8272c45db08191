// SPDX-License-Identifier: Apache-2.0

import LinuxSystem
import TestGuest
import TestSupport
import Testing

@Suite(.enabled(if: Host.hasKVM, "no usable /dev/kvm"))
struct LargeGuestTests {
  @Test(
    "A guest uses its last pages at once, while slots are still being added",
    .timeLimit(.minutes(10)), arguments: [1, 3, 64])
  func lastPages(_ gibibytes: Int) throws {
    let memory = try Memory(mebibytes: gibibytes << 10)
    let last = memory.range.length / 4096
    let options = WorkloadOptions(pages: last - 600..<last, batch: 8)
    let guest = try TestGuest(booting: memory.range, vcpus: 2, kind: .kvm)
    #expect(try guest.run(.fill(seed: 4), options).pages == 600)
    #expect(try guest.run(.verify(seed: 4), options).wrongPages == 0)
    guest.pause()
    let states = try guest.saveState()
    guest.shutdown()
    let restored = try TestGuest(restoring: memory.range, states: states, kind: .kvm)
    #expect(try restored.run(.verify(seed: 4, order: .random), options).wrongPages == 0)
    restored.shutdown()
  }

  @Test("A guest can be shut down while its slots are being added")
  func earlyShutdown() throws {
    let memory = try Memory(mebibytes: 64 << 10)
    for _ in 0..<3 {
      let guest = try TestGuest(booting: memory.range, kind: .kvm)
      guest.shutdown()
    }
  }
}
