// SPDX-License-Identifier: Apache-2.0

import GuestMemory
import LinuxSystem
import MemoryImage
import Snapshot
import SnapshotRestore
import Synchronization
import SystemPackage
import TestSupport
import Testing

/// A guest of one thread that writes one word, just before its pause.
private final class OneWriteGuest: SnapshotGuest {
  let memory: GuestMemoryHandle
  let page: Int
  /// Set by the thread that lets the write happen, when it has been told of it.
  let isAnnounced = Atomic(false)
  /// Keeps that thread there.
  let gate = ThreadGate()
  private let writer = Mutex<ThreadHandle?>(nil)

  init(_ backing: MemoryBacking, page: Int) throws {
    self.page = page
    let memory = try GuestMemoryObject(backing: backing, length: 8 << 20)
    for offset in stride(from: 0, to: memory.range.length, by: 4096) {
      store(1, memory.range, offset: offset)
    }
    self.memory = GuestMemoryHandle(memory)
  }

  var snapshotRegions: [SnapshotRegion] {
    let image = ImageRegion(
      name: "ram", guestAddress: GuestAddress(0), length: memory.range.length,
      pageSize: memory.backing.pageSize)
    return [SnapshotRegion(image: image, host: memory.range, backing: memory.backing)]
  }

  func pause() throws(SnapshotError) {
    let (range, offset) = (memory.range, page * 4096)
    do {
      let thread = try ThreadHandle.start { store(2, range, offset: offset) }
      writer.withLock { $0 = thread }
    } catch {
      throw SnapshotError(.guest, "\(error)")
    }
    guard Delay.until({ isAnnounced.load(ordering: .acquiring) }) else {
      throw SnapshotError(.guest, "nobody was told of the write")
    }
  }

  /// The write happens before anything is copied.
  func resume() {
    gate.open()
    writer.withLock { $0.take() }?.join()
  }

  func saveDeviceStates() -> [DeviceState] { [] }
}

extension SnapshotTests {
  @Suite("A thread that is held up between two steps") struct PreemptionTests {
    static let backings: [MemoryBacking] =
      [.anonymous, .memfd] + (Host.hasHugePages(8) ? [.hugetlb(.size2MiB)] : [])

    @Test(
      "A write that was announced before the pause and happens after it is not in the image",
      arguments: backings)
    func writeUnderWay(backing: MemoryBacking) throws {
      try withTemporaryDirectory { directory in
        let path = FilePath(directory + "/image")
        let guest = try OneWriteGuest(backing, page: 700)
        var options = SnapshotOptions()
        options.beforeWrite = { _ in
          guest.isAnnounced.store(true, ordering: .releasing)
          guest.gate.wait()
        }
        let report = try Snapshotter(guest).takeLive(to: path, options)
        #expect(report.copiedFirst == backing.pageSize.bytes / 4096)
        #expect(load(guest.memory.range, offset: 700 * 4096) == 2)
        let image = try MemoryImage(path: path)
        let room = try Mapping(anonymous: 4096)
        _ = try unsafe image.read(region: 0, firstBlock: 700, blockCount: 1, into: room.pointer)
        #expect(load(room.range, offset: 0) == 1, "the page is from after the pause")
      }
    }
  }
}
