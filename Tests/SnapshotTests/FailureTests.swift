// SPDX-License-Identifier: Apache-2.0

import CTestSupport
import Foundation
import GuestMemory
import LinuxSystem
import MemoryImage
import Snapshot
import SnapshotRestore
import Synchronization
import SystemPackage
import TestGuest
import TestSupport
import Testing
import Userfault

/// Files of a directory.
func names(in directory: String) throws -> [String] {
  try FileManager.default.contentsOfDirectory(atPath: directory).sorted()
}

extension SnapshotTests {
  @Suite(
    "A snapshot that fails leaves the guest running and unwatched, and no half image",
    .enabled(if: Host.hasPrivileges, "needs root to watch the kernel's faults"))
  struct FailureTests {
    @Test("In the pause, and after it", arguments: GuestCase.here, [false, true])
    func failures(_ kind: GuestCase, isLive: Bool) throws {
      try withTemporaryDirectory { directory in
        let subject = try Subject(kind)
        try subject.startWriting()
        let snapshotter = Snapshotter(subject)
        let path = FilePath("\(directory)/a.img")
        func fail() throws {
          #expect(throws: SnapshotError.self) {
            isLive ? try snapshotter.takeLive(to: path) : try snapshotter.take(to: path)
          }
          #expect(try names(in: directory).isEmpty)
          try subject.expectRunningUnwatched()
        }
        subject.duringPause.withLock {
          $0 = { () throws(SnapshotError) in throw SnapshotError(.guest, "no state") }
        }
        try fail()
        // Refused when the memory has been copied.
        subject.extraMetadata.withLock { $0 = ["": "no key"] }
        try fail()
        subject.extraMetadata.withLock { $0 = [:] }
        _ = try isLive ? snapshotter.takeLive(to: path) : snapshotter.take(to: path)
        try subject.expectExact(path)
      }
    }

    @Test("On a full disk", .timeLimit(.minutes(10)))
    func fullDisk() async {
      await #expect(processExitsWith: .success) {
        // A filesystem of this process only, and of this thread and those that it starts.
        try withTemporaryDirectory { directory in
          precondition(unsafe ctest_mount_private_tmpfs(directory, "size=4m") == 0)
          for kind in GuestCase.here {
            for isLive in [false, true] {
              let subject = try Subject(kind)
              try subject.startWriting()
              let snapshotter = Snapshotter(subject)
              let path = FilePath("\(directory)/a.img")
              var text = ""
              do throws(SnapshotError) {
                _ = try isLive ? snapshotter.takeLive(to: path) : snapshotter.take(to: path)
              } catch {
                text = error.description
              }
              precondition(text.contains("No space left on device"), text)
              let left = try names(in: directory)
              precondition(left.isEmpty, "\(left)")
              let before = subject.guest.batches
              precondition(
                Delay.until { subject.guest.batches > before + 8 }, "\(kind) stands still")
              precondition(Host.threads(named: "dirty-wp") == 0)
              precondition(openDescriptors(of: "userfaultfd") == 0)
            }
          }
        }
      }
    }

    @Test("On a page that is poisoned, which is named", arguments: [false, true])
    func poisonedPage(isLive: Bool) throws {
      try withTemporaryDirectory { directory in
        let subject = try Subject(GuestCase(kind: .process, backing: .anonymous))
        let page = HostRange(
          start: subject.memory.range.start.advanced(by: 3000 * 4096), length: 4096)
        do {
          let userfaultfd = try Userfaultfd(wanting: .poison)
          try userfaultfd.register(page, modes: .missing)
          try subject.memory.object.mapping.advise(.dontNeed, offset: 3000 * 4096, length: 4096)
          #expect(userfaultfd.poison(page).obstacle == nil)
        }
        let snapshotter = Snapshotter(subject)
        let path = FilePath("\(directory)/a.img")
        let error = #expect(throws: SnapshotError.self) {
          isLive ? try snapshotter.takeLive(to: path) : try snapshotter.take(to: path)
        }
        #expect(error?.description.contains("0xbb8000") == true, "\(error as Any)")
        #expect(try names(in: directory).isEmpty)
      }
    }

    @Test("What was written is in the next increment all the same")
    func nothingIsForgotten() throws {
      try withTemporaryDirectory { directory in
        let subject = try Subject(GuestCase(kind: .process, backing: .anonymous))
        let tracking = try subject.guest.makeDirtyTracking(.async, backing: .anonymous)
        let snapshotter = Snapshotter(subject, tracking: tracking)
        _ = try snapshotter.take(to: FilePath("\(directory)/a.img"))
        for round in 0..<3 {
          let pages = 1000 + 500 * round..<1200 + 500 * round
          _ = try subject.guest.run(.dirty(seed: 9, generations: 1), WorkloadOptions(pages: pages))
          subject.extraMetadata.withLock { $0 = ["": "no key"] }
          #expect(throws: SnapshotError.self) {
            try snapshotter.take(to: FilePath("\(directory)/b.img"), SnapshotOptions(.incremental))
          }
        }
        subject.extraMetadata.withLock { $0 = [:] }
        let path = FilePath("\(directory)/b.img")
        let report = try snapshotter.take(to: path, SnapshotOptions(.incremental))
        #expect(report.pages >= 600)
        try subject.expectExact(path)
      }
    }

    @Test("Two at a time are refused")
    func twoAtATime() throws {
      try withTemporaryDirectory { directory in
        let subject = try Subject(GuestCase(kind: .process, backing: .anonymous))
        let snapshotter = Snapshotter(subject)
        let second = FilePath("\(directory)/b.img")
        subject.duringPause.withLock {
          $0 = { () throws(SnapshotError) in _ = try snapshotter.take(to: second) }
        }
        let error = #expect(throws: SnapshotError.self) {
          try snapshotter.take(to: FilePath("\(directory)/a.img"))
        }
        #expect(error?.description.contains("is being taken") == true)
      }
    }

    @Test("Snapshots leave no descriptor, thread or mapping behind", .timeLimit(.minutes(10)))
    func leavesNothing() async {
      await #expect(processExitsWith: .success) {
        try withTemporaryDirectory { directory in
          let subject = try Subject(GuestCase(kind: .process, backing: .anonymous))
          try subject.startWriting()
          let snapshotter = Snapshotter(subject)
          func take() throws { _ = try snapshotter.takeLive(to: FilePath("\(directory)/a.img")) }
          try take()
          let descriptors = openDescriptorCount()
          let maps = try Host.processFile("maps")
            .split(separator: "\n").count
          for _ in 0..<4 { try take() }
          precondition(openDescriptorCount() == descriptors)
          let after = try Host.processFile("maps")
            .split(separator: "\n").count
          precondition(after <= maps + 4, "mappings: \(maps), then \(after)")
        }
      }
    }

    @Test("An increment is never of another image that has taken the last one's name")
    func replaced() throws {
      try withTemporaryDirectory { directory in
        let path = FilePath("\(directory)/a.img")
        let subject = try Subject(GuestCase(kind: .process, backing: .anonymous))
        let tracking = try subject.guest.makeDirtyTracking(.async, backing: .anonymous)
        let snapshotter = Snapshotter(subject, tracking: tracking)
        _ = try snapshotter.take(to: path)
        // The same machine, other content.
        let other = try Subject(GuestCase(kind: .process, backing: .anonymous), fill: 1000..<1010)
        _ = try Snapshotter(other).take(to: path)
        let second = FilePath("\(directory)/b.img")
        let error = #expect(throws: SnapshotError.self) {
          try snapshotter.take(to: second, SnapshotOptions(.incremental))
        }
        #expect(error?.code == .image)
        #expect(error?.description.contains("has another image now") == true, "\(error as Any)")
        #expect(try names(in: directory) == ["a.img"])
        // A full one is what helps.
        _ = try snapshotter.take(to: second)
        try subject.expectExact(second)
      }
    }
  }
}
