// SPDX-License-Identifier: Apache-2.0

import GuestMemory
import Pager
import Snapshot
import SnapshotRestore
import SystemPackage
import TestGuest
import TestSupport
import Testing

extension SnapshotTests {
  @Suite("Clones of a snapshot")
  struct CloneTests {
    @Test(
      "Guests that share their clean pages verify all of them, and what they wrote",
      arguments: TestGuest.kinds)
    func clones(kind: TestGuest.Kind) throws {
      try withTemporaryDirectory { directory in
        let path = FilePath(directory + "/guest.img")
        let pages = 4096
        let memory = GuestMemoryHandle(try .init(backing: .anonymous, length: pages * 4096))
        let guest = try TestGuest(booting: memory.range, kind: kind)
        _ = try guest.run(.fill(seed: 1))
        _ = try Snapshotter(TestGuestSnapshots(guest, memory)).take(to: path, leavesPaused: true)
        guest.shutdown()

        let cache = try SharedPageCache(length: pages * 4096)
        var options = RestoreOptions()
        options.cleanPages = cache
        options.pager.faultThreads = 1
        let clones = try (0..<3).map { _ in try RestoredGuest(path, options) }
        // One of them becomes another one, while all are served.
        _ = try clones[1].guest.run(.fill(seed: 2))
        for (clone, seed) in zip(clones, [1, 2, 1]) {
          let result = try clone.guest.run(.verify(seed: UInt64(seed), order: .random))
          #expect(result.pages > UInt64(pages) * 9 / 10 && result.wrongPages == 0, "\(result)")
        }
        #expect(clones[2].session.statistics.continuedPages > 0)
        for clone in clones { clone.shutdown() }
        // The cache is as clean as before.
        let late = try RestoredGuest(path, options)
        let result = try late.guest.run(.verify(seed: 1, order: .sequential))
        #expect(result.wrongPages == 0 && late.session.statistics.copiedPages < 64)
        late.shutdown()
      }
    }
  }
}

extension TestGuest {
  /// The kinds that this machine has.
  static var kinds: [Kind] { kvmIsAvailable() ? [.kvm, .process] : [.process] }
}
