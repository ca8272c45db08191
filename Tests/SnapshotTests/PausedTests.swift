// SPDX-License-Identifier: Apache-2.0

import GuestMemory
import LinuxSystem
import MemoryImage
import Snapshot
import SnapshotRestore
import SystemPackage
import TestGuest
import TestSupport
import Testing

extension SnapshotTests {
  @Suite("Snapshots of a paused guest")
  struct PausedTests {
    /// Every way to track writes that works for a guest here.
    static let tracked: [(GuestCase, DirtyTrackingMethod)] = GuestCase.here.flatMap { kind in
      DirtyTrackingMethod.allCases.compactMap { method in
        let isOfKVM = method == .ring || method == .log
        if isOfKVM ? kind.kind != .kvm : !Host.hasPrivileges { return nil }
        return (kind, method)
      }
    }

    @Test("Each image of a chain is the memory at its pause", arguments: tracked)
    func chain(_ kind: GuestCase, _ method: DirtyTrackingMethod) throws {
      try withTemporaryDirectory { directory in
        let subject = try Subject(kind, ringEntries: method == .ring ? 4096 : 0)
        let tracking = try subject.guest.makeDirtyTracking(method, backing: kind.backing)
        let snapshotter = Snapshotter(subject, tracking: tracking)
        for number in 0..<4 {
          let path = FilePath("\(directory)/\(number).img")
          let pages = 1024 + 512 * number..<1024 + 512 * number + 300
          _ = try subject.guest.run(.dirty(seed: 9, generations: 1), WorkloadOptions(pages: pages))
          let report = try snapshotter.take(
            to: path, SnapshotOptions(number == 0 ? .full : .incremental))
          try subject.expectExact(path)
          if number > 0 { #expect((300..<3000).contains(report.pages), "\(report.pages)") }
        }
        #expect(try MemoryImage(path: FilePath("\(directory)/3.img")).ancestors.count == 3)
      }
    }

    @Test("The guest is paused afterwards when that is asked for, and only then")
    func leavesPaused() throws {
      try withTemporaryDirectory { directory in
        let subject = try Subject(GuestCase(kind: .process, backing: .anonymous))
        try subject.startWriting()
        let snapshotter = Snapshotter(subject)
        _ = try snapshotter.take(to: FilePath("\(directory)/a.img"))
        try subject.expectRunningUnwatched()
        _ = try snapshotter.take(to: FilePath("\(directory)/b.img"), leavesPaused: true)
        let batches = subject.guest.batches
        Delay.microseconds(20_000)
        #expect(subject.guest.batches == batches)
        subject.resume()
        try subject.expectRunningUnwatched()
      }
    }

    @Test("Pages that are said to have changed are in the next increment")
    func notedPages() throws {
      try withTemporaryDirectory { directory in
        let subject = try Subject(
          GuestCase(kind: .process, backing: .anonymous))
        let tracking = try subject.guest.makeDirtyTracking(.async, backing: .anonymous)
        let snapshotter = Snapshotter(subject, tracking: tracking)
        _ = try snapshotter.take(to: FilePath("\(directory)/a.img"))
        // A balloon takes pages away: they read as zero, and nobody wrote.
        let pages = 2048..<2100
        subject.guest.pause()
        try subject.memory.object.mapping.advise(
          .dontNeed, offset: pages.lowerBound * 4096, length: pages.count * 4096)
        subject.guest.resume()
        snapshotter.noteChanged(pages)
        let path = FilePath("\(directory)/b.img")
        _ = try snapshotter.take(to: path, SnapshotOptions(.incremental))
        try subject.expectExact(path)
      }
    }

    @Test("An increment needs a tracker and an image to build on")
    func nothingToBuildOn() throws {
      try withTemporaryDirectory { directory in
        let subject = try Subject(GuestCase(kind: .process, backing: .anonymous))
        let path = FilePath("\(directory)/a.img")
        for tracking in [nil, try subject.guest.makeDirtyTracking(.async, backing: .anonymous)] {
          let error = #expect(throws: SnapshotError.self) {
            try Snapshotter(subject, tracking: tracking).take(
              to: path, SnapshotOptions(.incremental))
          }
          #expect(error?.code == .tracking)
        }
        #expect(try names(in: directory).isEmpty)
      }
    }

    @Test("An increment may not replace an image that it builds on")
    func replacesParent() throws {
      try withTemporaryDirectory { directory in
        let subject = try Subject(GuestCase(kind: .process, backing: .anonymous))
        let tracking = try subject.guest.makeDirtyTracking(.async, backing: .anonymous)
        let snapshotter = Snapshotter(subject, tracking: tracking)
        let (first, second) = (FilePath("\(directory)/a.img"), FilePath("\(directory)/b.img"))
        _ = try snapshotter.take(to: first)
        _ = try snapshotter.take(to: second, SnapshotOptions(.incremental))
        for path in [first, second] {
          let error = #expect(throws: SnapshotError.self) {
            try snapshotter.take(to: path, SnapshotOptions(.incremental))
          }
          #expect(error?.code == .image)
        }
        try subject.expectExact(second)
      }
    }
  }
}
