// SPDX-License-Identifier: Apache-2.0

import GuestMemory
import LinuxSystem
import Pager
import TestSupport
import Testing

@Suite("Storms, with the model of userfaultfd as oracle")
struct StormTests {
  /// More of them: FAULTLINE_STORM_ROUNDS=200 swift test --filter StormTests
  @Test(
    "Reads, writes, MADV_DONTNEED, MADV_REMOVE, munmap and filling ahead: every read is right",
    arguments: cases, StormWay.all)
  func everyReadIsRight(kind: MemoryCase, way: StormWay) throws {
    let usual = kind.backing.pageSize == .size4KiB ? 5 : 1
    for round in 0..<testSetting("FAULTLINE_STORM_ROUNDS", usual: usual) {
      let seed = UInt64(round) + 1
      let wrong = try Storm(kind, way, seed: seed).run()
      #expect(wrong.isEmpty, "seed \(seed)")
    }
  }
}
