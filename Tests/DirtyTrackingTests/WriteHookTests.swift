// SPDX-License-Identifier: Apache-2.0

import Glibc
import GuestMemory
import LinuxSystem
import Synchronization
import TestGuest
import TestSupport
import Testing

/// A copy of pages that is made before they change.
private final class PointInTime: Sendable {
  let copy: Mapping
  private let source: HostRange
  private let pagesDone: Mutex<DirtyBitmap>
  /// Pages that the hook came to while this was switched on.
  let announced: Mutex<[Range<Int>]>
  let isOn = Atomic<Bool>(false)

  init(_ source: HostRange) throws {
    copy = try Mapping(anonymous: source.length)
    self.source = source
    pagesDone = Mutex(DirtyBitmap(pageCount: source.length / 4096))
    announced = Mutex([])
    announced.withLock { $0.reserveCapacity(source.length / 4096) }
  }

  func announce(_ pages: Range<Int>) {
    guard isOn.load(ordering: .acquiring) else { return }
    announced.withLock { $0.append(pages) }
    save(pages)
  }

  func save(_ pages: Range<Int>) {
    pagesDone.withLock { done in
      guard done.count(in: pages) == 0 else { return }
      // SAFETY: both ranges have these pages, and those that are not done are protected.
      unsafe (copy.pointer + pages.lowerBound * 4096).copyMemory(
        from: UnsafeRawPointer(
          bitPattern: UInt(source.start.rawValue) + UInt(pages.lowerBound * 4096)
        ).unsafelyUnwrapped, byteCount: pages.count * 4096)
      done.insert(pages)
    }
  }

  /// Pages that differ from a copy that was made at the time.
  func differences(from other: borrowing Mapping) -> [Int] {
    (0..<source.length / 4096).filter { page in
      // SAFETY: both have this page.
      unsafe memcmp(copy.pointer + page * 4096, other.pointer + page * 4096, 4096) != 0
    }
  }
}

extension DirtyTrackingTests {
  @Suite("The hook comes before the write")
  struct WriteHookTests {
    private func tracker(
      _ subject: Subject, _ hook: @escaping WriteProtectTracking.WriteHook
    ) throws -> WriteProtectTracking {
      try #require(try subject.track(hook) as? WriteProtectTracking)
    }

    @Test(
      "Copying pages when they are announced gives memory as it was when it was armed",
      .timeLimit(.minutes(10)), arguments: writeProtectCases, [1, 2])
    func pointInTime(_ kind: TrackingCase, _ vcpus: Int) throws {
      let subject = try Subject(kind, vcpus: vcpus)
      let saved = try PointInTime(subject.range)
      let tracker = try tracker(subject) { saved.announce($0) }
      try subject.guest.start(.dirty(seed: 1))
      // Ahead of the pause, while the guest runs; then what it wrote meanwhile.
      try tracker.start()
      subject.guest.pause()
      _ = try tracker.collect()
      saved.isOn.store(true, ordering: .releasing)
      let truth = try Mapping(anonymous: subject.range.length)
      // SAFETY: as long as the guest's memory; the guest stands still.
      unsafe truth.pointer.copyMemory(
        from: subject.memory.mapping.pointer, byteCount: truth.length)
      subject.guest.resume()
      #expect(Delay.until { saved.announced.withLock { $0.count } > 0 })
      let unit = kind.unit
      for page in stride(from: 0, to: subject.pageCount, by: unit) {
        saved.save(page..<page + unit)
        try tracker.disarm(page..<page + unit)
      }
      tracker.stop()
      let differences = saved.differences(from: truth)
      #expect(differences == [])
      subject.guest.stop()
      _ = try subject.guest.wait()
    }

    @Test("A page is announced once each time it is armed", arguments: writeProtectCases)
    func once(_ kind: TrackingCase) throws {
      let subject = try Subject(kind, vcpus: 2)
      let saved = try PointInTime(subject.range)
      let tracker = try tracker(subject) { saved.announce($0) }
      try tracker.start()
      saved.isOn.store(true, ordering: .releasing)
      func announcements() -> [Int] {
        saved.announced.withLock { list in
          defer { list.removeAll(keepingCapacity: true) }
          return list.map(\.lowerBound).filter { $0 >= kind.firstQuietPage }.sorted()
        }
      }
      let expected = Array(
        stride(from: kind.rounded(1024..<1100).lowerBound, to: 1100, by: kind.unit))
      try subject.write(1024..<1100, seed: 1)
      #expect(announcements() == expected)
      try subject.write(1024..<1100, seed: 2)
      #expect(announcements() == [])
      // Armed again by collect, and by arm.
      _ = try tracker.collect()
      try subject.write(1024..<1100, seed: 3)
      #expect(announcements() == expected)
      try tracker.arm(0..<tracker.pageCount)
      try subject.write(1024..<1100, seed: 4)
      #expect(announcements() == expected)
      // Armed, then let go.
      try tracker.arm(0..<tracker.pageCount)
      try tracker.disarm(1024..<2048)
      // A fault that was asked for twice may have been announced in between.
      _ = announcements()
      try subject.write(1024..<1100, seed: 5)
      #expect(announcements() == [])
      tracker.stop()
    }

    @Test("Two threads that write to one page wait for one announcement", arguments: [100])
    func oneForTwo(_ rounds: Int) throws {
      let memory = try GuestMemoryObject(backing: .anonymous, length: 4096)
      let range = memory.range
      store(1, range, offset: 0)
      let calls = Atomic<Int>(0)
      let tracker = try WriteProtectTracking([TrackedRegion(memory)]) { _ in
        Delay.microseconds(200)
        precondition(load(range, offset: 0) & 1 == 1, "written before the hook returned")
        calls.wrappingAdd(1, ordering: .relaxed)
      }
      try tracker.start()
      for round in 1...rounds {
        try inThreads(2) { index in store(UInt64(2 * index), range, offset: 8 * index) }
        #expect(calls.load(ordering: .relaxed) == round)
        var bitmap = DirtyBitmap(pageCount: 1)
        try tracker.collect(into: &bitmap)
        #expect(bitmap[0])
        // Odd again, and armed again.
        try tracker.disarm(0..<1)
        store(1, range, offset: 0)
        try tracker.arm(0..<1)
      }
      tracker.stop()
    }

    @Test("Regions are numbered one after the other")
    func regions() throws {
      let first = try GuestMemoryObject(backing: .anonymous, length: 100 * 4096)
      let second = try GuestMemoryObject(backing: .memfd, length: 30 * 4096)
      let regions = [TrackedRegion(first), TrackedRegion(second)]
      let trackers: [any DirtyTracking] = [
        try WriteProtectTracking(regions), try AsynchronousTracking(regions),
      ]
      for tracker in trackers {
        #expect(tracker.pageCount == 130)
        try tracker.start()
        store(1, first.range, offset: 99 * 4096)
        store(1, second.range, offset: 0)
        store(1, second.range, offset: 29 * 4096)
        #expect(Array(try tracker.collect().ranges) == [99..<101, 129..<130])
        tracker.stop()
      }
      #expect(throws: DirtyTrackingError.self) {
        _ = try WriteProtectTracking([
          TrackedRegion(
            host: HostRange(start: first.range.start, length: 4096),
            backing: .hugetlb(.size2MiB))
        ])
      }
    }
  }
}
