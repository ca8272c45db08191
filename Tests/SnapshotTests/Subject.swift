// SPDX-License-Identifier: Apache-2.0

import Glibc
import GuestMemory
import KVM
import LinuxSystem
import MemoryImage
import Snapshot
import SnapshotRestore
import Synchronization
import SystemPackage
import TestGuest
import TestSupport
import Testing

/// One test at a time: each has a guest that takes the machine for itself, and huge pages are
/// few.
@Suite(.serialized) enum SnapshotTests {}

/// What a guest is made of.
struct GuestCase: Sendable, CustomStringConvertible {
  let kind: TestGuest.Kind
  let backing: MemoryBacking
  var description: String { "\(kind == .kvm ? "KVM" : "process")/\(backing)" }

  static let all = TestGuest.Kind.allCases.flatMap { kind in
    [MemoryBacking.anonymous, .memfd, .hugetlb(.size2MiB)].map {
      GuestCase(kind: kind, backing: $0)
    }
  }

  /// What this machine has of them.
  static let here = all.filter {
    if $0.kind == .kvm, !Host.hasKVM { return false }
    if case .hugetlb = $0.backing { return Host.hasHugePages(40) }
    return true
  }

  /// Those that are not here, for a skipped test to name.
  static var missing: String {
    all.filter { one in !here.contains { "\($0)" == "\(one)" } }.description
  }
}

/// A guest that can be saved, and remembers what its memory was at the pause.
final class Subject: SnapshotGuest {
  let kind: GuestCase
  let memory: GuestMemoryHandle
  let guest: TestGuest
  private let inner: TestGuestSnapshots
  private let atPause: Mapping
  /// What the next pause does, for tests of failures.
  let duringPause = Mutex<(@Sendable () throws(SnapshotError) -> Void)?>(nil)
  let extraMetadata = Mutex<[String: String]>([:])

  init(
    _ kind: GuestCase, mebibytes: Int = 32, vcpus: Int = 1, fill: Range<Int>? = nil,
    ringEntries: Int = 0
  ) throws {
    self.kind = kind
    memory = GuestMemoryHandle(
      try GuestMemoryObject(backing: kind.backing, length: mebibytes << 20))
    let handle =
      kind.kind == .kvm ? try GuestMachineHandle(dirtyRingEntries: ringEntries) : nil
    guest = try TestGuest(booting: memory.range, vcpus: vcpus, kind: kind.kind, handle: handle)
    inner = TestGuestSnapshots(guest, memory)
    atPause = try Mapping(anonymous: mebibytes << 20)
    _ = try guest.run(.fill(seed: 5), WorkloadOptions(pages: fill))
  }

  deinit { guest.shutdown() }

  var snapshotRegions: [SnapshotRegion] { inner.snapshotRegions }
  func pause() { inner.pause() }
  func resume() { inner.resume() }
  func snapshotMetadata() -> [String: String] {
    inner.snapshotMetadata().merging(extraMetadata.withLock { $0 }, uniquingKeysWith: { $1 })
  }
  func populatedRanges(ofRegion region: Int) throws(SnapshotError) -> [Range<Int>] {
    try inner.populatedRanges(ofRegion: region)
  }

  func saveDeviceStates() throws(SnapshotError) -> [DeviceState] {
    let states = try inner.saveDeviceStates()
    // Absent pages stay so: reading the object or the page tables is not touching it.
    // SAFETY: both mappings are this long, and the guest is paused.
    unsafe memset(atPause.pointer, 0, atPause.length)
    for range in try inner.populatedRanges(ofRegion: 0) {
      // A test may have poisoned a page.
      _ = try? unsafe GuardedCopy.read(
        from: memory.range.start.advanced(by: range.lowerBound),
        into: UnsafeMutableRawBufferPointer(
          start: atPause.pointer + range.lowerBound, count: range.count))
    }
    try duringPause.withLock { $0.take() }?()
    return states
  }

  /// Writes to its pages without end.
  func startWriting(_ pages: Range<Int>? = nil) throws {
    try guest.start(.dirty(seed: 5), WorkloadOptions(pages: pages))
  }

  /// Fails unless each page of an image is what the memory was at the last pause.
  func expectExact(
    _ path: FilePath, location: SourceLocation = #_sourceLocation
  ) throws {
    let image = try MemoryImage(path: path)
    let room = try Mapping(anonymous: 4096)
    var wrong: [Int] = []
    for block in 0..<atPause.length / 4096 {
      let read = try unsafe image.read(
        region: 0, firstBlock: block, blockCount: 1, into: room.pointer)
      // SAFETY: pages of mappings.
      if read.kind == .zero { unsafe memset(room.pointer, 0, 4096) }
      if unsafe memcmp(room.pointer, atPause.pointer + block * 4096, 4096) != 0 {
        wrong.append(block)
      }
    }
    #expect(
      wrong.isEmpty, "\(wrong.count) wrong pages, the first \(wrong.first ?? 0)",
      sourceLocation: location)
  }

  /// Fails unless the guest goes on, and nothing watches its memory.
  func expectRunningUnwatched(location: SourceLocation = #_sourceLocation) throws {
    let before = guest.batches
    #expect(
      Delay.until { guest.batches > before + 8 }, "the guest stands still", sourceLocation: location
    )
    #expect(!(try isWriteProtected), "it is still watched", sourceLocation: location)
  }

  /// Whether userfaultfd watches writes to the memory: the flag "uw" in /proc/self/smaps.
  var isWriteProtected: Bool {
    get throws {
      let address = memory.range.start.rawValue
      let smaps = try Host.processFile("smaps")
      var isOurs = false
      for line in smaps.split(separator: "\n") {
        let words = line.split(separator: " ")
        let bounds = words[0].split(separator: "-").compactMap { UInt64($0, radix: 16) }
        if bounds.count == 2 {
          isOurs = bounds[0] <= address && address < bounds[1]
        } else if isOurs, words[0] == "VmFlags:" {
          return words.contains("uw")
        }
      }
      throw Errno.noSuchAddressOrDevice
    }
  }

  /// Runs a saved guest; it verifies its own memory.
  static func verify(
    _ path: FilePath, backing: MemoryBacking, location: SourceLocation = #_sourceLocation
  ) throws {
    let restored = try RestoredGuest(path, RestoreOptions(backing: backing))
    defer { restored.shutdown() }
    restored.guest.stop()
    let dirtied = try restored.guest.wait().dirtied
    let report = try restored.guest.run(.verify(seed: 5, dirtied: dirtied))
    #expect(report.pages > 0, sourceLocation: location)
    #expect(
      report.wrongPages == 0, "\(report.firstWrongPage ?? 0) is wrong", sourceLocation: location)
  }
}
