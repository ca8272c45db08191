// SPDX-License-Identifier: Apache-2.0

import GuestMemory
import LinuxSystem
import MemoryImage
import Snapshot
import Synchronization
import SystemPackage
import TestGuest
import TestSupport
import Testing

extension SnapshotTests {
  @Suite(
    "A live snapshot is the memory at the pause",
    .enabled(if: Host.hasPrivileges, "needs root to watch the kernel's faults"))
  struct LiveTests {
    @Test("While the guest writes as fast as it can", arguments: GuestCase.here, [1, 2])
    func exact(_ kind: GuestCase, vcpus: Int) throws {
      try withTemporaryDirectory { directory in
        let subject = try Subject(kind, vcpus: vcpus)
        try subject.startWriting()
        let snapshotter = Snapshotter(subject)
        for number in 0..<2 {
          let path = FilePath("\(directory)/\(number).img")
          let report = try snapshotter.takeLive(to: path)
          #expect(report.copiedFirst > 0, "the guest wrote nothing meanwhile")
          #expect((7936...8192).contains(report.pages))
          try subject.expectExact(path)
          try subject.expectRunningUnwatched()
          try Subject.verify(path, backing: kind.backing)
        }
      }
    }

    @Test("When there is room for few pages that are copied first", arguments: GuestCase.here)
    func smallPool(_ kind: GuestCase) throws {
      try withTemporaryDirectory { directory in
        let subject = try Subject(kind)
        try subject.startWriting()
        let path = FilePath("\(directory)/live.img")
        var options = SnapshotOptions(image: ImageOptions(encoding: .zstd(level: 9)))
        options.preimageBytes = 0
        options.threads = 1
        _ = try Snapshotter(subject).takeLive(to: path, options)
        try subject.expectExact(path)
        try subject.expectRunningUnwatched()
      }
    }

    @Test(
      "Pages that were absent at the pause are zero, also when they are written meanwhile",
      arguments: GuestCase.here)
    func absentPages(_ kind: GuestCase) throws {
      try withTemporaryDirectory { directory in
        // The guest has filled the upper half and writes to all of it.
        let subject = try Subject(kind, fill: 4096..<8192)
        let path = FilePath("\(directory)/live.img")
        subject.duringPause.withLock {
          $0 = { [guest = subject.guest] in
            // It begins to write in the pause: nothing of this may be in the image.
            try? guest.start(.dirty(seed: 5), WorkloadOptions(pages: 1024..<8192))
          }
        }
        _ = try Snapshotter(subject).takeLive(to: path)
        #expect(Delay.until { subject.guest.batches > 100 })
        try subject.expectExact(path)
        let image = try MemoryImage(path: path)
        let room = try Mapping(anonymous: 4096)
        let absent = try unsafe image.read(
          region: 0, firstBlock: 2048, blockCount: 1, into: room.pointer)
        #expect(absent.kind == .zero)
      }
    }

    @Test(
      "Live snapshots can be incremental", .enabled(if: Host.hasKVM, "no usable /dev/kvm"),
      arguments: [DirtyTrackingMethod.ring, .log], GuestCase.here.filter { $0.kind == .kvm })
    func incremental(_ method: DirtyTrackingMethod, _ kind: GuestCase) throws {
      try withTemporaryDirectory { directory in
        let subject = try Subject(kind, ringEntries: method == .ring ? 4096 : 0)
        let tracking = try subject.guest.makeDirtyTracking(method, backing: kind.backing)
        let snapshotter = Snapshotter(subject, tracking: tracking)
        try subject.startWriting(512..<1024)
        for number in 0..<4 {
          let path = FilePath("\(directory)/\(number).img")
          let report = try snapshotter.takeLive(
            to: path, SnapshotOptions(number == 0 ? .full : .incremental))
          if number > 0 { #expect(report.pages <= 1024 + 512, "\(report.pages)") }
          try subject.expectExact(path)
          try subject.expectRunningUnwatched()
        }
        #expect(try MemoryImage(path: FilePath("\(directory)/3.img")).ancestors.count == 3)
        try Subject.verify(FilePath("\(directory)/3.img"), backing: .anonymous)
      }
    }

    @Test(
      "Memory that two would watch by userfaultfd is refused, and the guest goes on",
      arguments: [DirtyTrackingMethod.async, .writeProtect])
    func conflict(_ method: DirtyTrackingMethod) throws {
      try withTemporaryDirectory { directory in
        let subject = try Subject(GuestCase(kind: .process, backing: .anonymous))
        try subject.startWriting()
        let tracking = try subject.guest.makeDirtyTracking(method, backing: .anonymous)
        let snapshotter = Snapshotter(subject, tracking: tracking)
        let error = #expect(throws: SnapshotError.self) {
          try snapshotter.takeLive(to: FilePath("\(directory)/live.img"))
        }
        #expect(error?.code == .tracking)
        let before = subject.guest.batches
        #expect(Delay.until { subject.guest.batches > before + 8 })
        // The tracker itself still works.
        _ = try snapshotter.take(to: FilePath("\(directory)/paused.img"))
        try subject.expectExact(FilePath("\(directory)/paused.img"))
      }
    }
  }
}
