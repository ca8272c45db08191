// SPDX-License-Identifier: Apache-2.0

import GuestMemory
import LinuxSystem
import MemoryImage
import Pager
import Snapshot
import SnapshotRestore
import SystemPackage
import TestGuest

/// Whole guests on guest_memfd: restored, verified, snapshotted.
enum GuestScenarios {
  private static let length = 256 << 20
  private static let image: FilePath = "/tmp/guest.image"
  private static let seed: UInt64 = 11

  static var all: [Scenario] {
    [
      .noting(
        "guest: filled and saved, for the scenarios that follow", on: [.patched, .unpatched]
      ) {
        let memory = GuestMemoryHandle(
          try GuestMemoryObject(backing: .anonymous, length: length))
        let guest = try TestGuest(booting: memory.range, vcpus: 2, kind: .kvm)
        defer { guest.shutdown() }
        let report = try guest.run(.fill(seed: seed))
        _ = try Snapshotter(TestGuestSnapshots(guest, memory)).take(
          to: image, SnapshotOptions(image: ImageOptions(encoding: .stored)), leavesPaused: true)
        return "\(report.pages) pages"
      },
      Scenario("guest: the strategy that is found is three-way") {
        try expect(try GuestMemfdStrategy.probe().strategy, .threeWay, "the strategy")
      },
      .noting("guest: the strategy that is found is ahead of time", on: [.unpatched]) {
        let (strategy, reason) = try GuestMemfdStrategy.probe()
        try expect(strategy, .aheadOfTime, "the strategy")
        return reason
      },
      .noting("guest: 256 MiB, slot bound, lazily: three-way") {
        let restored = try restore(.threeWay)
        defer { restored.shutdown() }
        // Some pages are touched by the host first, the guest's verification does the rest,
        // and then the host touches pages that only the vCPUs have.
        let early = stride(from: 1 << 20, to: 9 << 20, by: 1 << 16)
        for offset in early { try touch(restored, offset) }
        let note = try verify(restored)
        for offset in stride(from: 16 << 20, to: 24 << 20, by: 1 << 16) {
          try touch(restored, offset)
        }
        let counts = restored.session.statistics
        try require(counts.missingFaults >= 128, "\(counts.missingFaults) missing faults")
        try require(counts.minorFaults >= 128, "\(counts.minorFaults) minor faults")
        try require(counts.stageTwoFaults > 60_000, "\(counts.stageTwoFaults) stage-2 faults")
        return "\(note); \(describe(restored.session.statistics))"
      },
      .noting("guest: 256 MiB, slot not bound, lazily: two-way") {
        let restored = try restore(.twoWay)
        defer { restored.shutdown() }
        let note = try verify(restored)
        let counts = restored.session.statistics
        try expect(counts.stageTwoFaults, 0, "stage-2 faults")
        try require(counts.missingFaults > 60_000, "\(counts.missingFaults) missing faults")
        return "\(note); \(describe(counts))"
      },
      .noting("guest: 256 MiB, slot bound, ahead of time", on: [.patched, .unpatched]) {
        let restored = try restore(.aheadOfTime)
        defer { restored.shutdown() }
        return try verify(restored)
      },
      .noting("guest: a snapshot of a guest that is restored lazily verifies again") {
        let path: FilePath = "/tmp/second.image"
        do {
          let restored = try restore(.threeWay)
          defer { restored.shutdown() }
          _ = try restored.guest.run(.verify(seed: seed, order: .random), .init(pages: 256..<8192))
          let subject = TestGuestSnapshots(
            restored.guest, restored.memory, skipsAbsentPages: false)
          _ = try Snapshotter(subject).take(to: path, leavesPaused: true)
        }
        let again = try RestoredGuest(path, options(.threeWay))
        defer { again.shutdown() }
        return try verify(again)
      },
      // Last, for it damages the image.
      .noting("guest: a vCPU that needs a damaged block stops, and the block is named") {
        let block = try DamagedBlock.make(in: image, from: 5000)
        let restored = try restore(.threeWay)
        defer { restored.shutdown() }
        do throws(GuestError) {
          _ = try restored.guest.run(.verify(seed: seed, order: .sequential))
        } catch {
          try expect(error.code, .memoryFault, "the error")
          try expect(restored.session.failures.count, 1, "failures")
          try expect(
            restored.session.failures.first?.guestAddress.rawValue, UInt64(block) * 4096,
            "the address")
          return "\(restored.session.failures[0])"
        }
        throw Mismatch(description: "the guest did not notice")
      },
    ]
  }

  private static func options(_ strategy: GuestMemfdStrategy) -> RestoreOptions {
    var options = RestoreOptions(backing: .guestMemfd)
    options.guestMemfd = strategy
    return options
  }

  private static func restore(_ strategy: GuestMemfdStrategy) throws -> RestoredGuest {
    let restored = try RestoredGuest(image, options(strategy))
    try expect(restored.guestMemfd, strategy, "the strategy")
    return restored
  }

  private static func verify(_ restored: RestoredGuest) throws -> String {
    let report = try restored.guest.run(.verify(seed: seed, order: .random))
    try expect(report.wrongPages, 0, "wrong pages")
    try expect(report.pages, UInt64(length - (1 << 20)) / 4096, "pages that were verified")
    return "\(report.pages) pages verified, 0 wrong"
  }

  private static func touch(_ restored: RestoredGuest, _ offset: Int) throws {
    let outcome = try Toucher(restored.memory.range.start.advanced(by: offset)).outcome()
    guard case .value = outcome else {
      throw Mismatch(description: "touching offset \(offset): \(outcome)")
    }
  }

  private static func describe(_ counts: PagerStatistics) -> String {
    "faults: \(counts.missingFaults) missing, \(counts.minorFaults) minor, "
      + "\(counts.stageTwoFaults) stage-2"
  }
}
