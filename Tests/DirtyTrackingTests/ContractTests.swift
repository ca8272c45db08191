// SPDX-License-Identifier: Apache-2.0

import GuestMemory
import LinuxSystem
import Synchronization
import TestGuest
import TestSupport
import Testing

extension DirtyTrackingTests {
  @Suite("What a tracker reports is what was written")
  struct DirtyContractTests {
    @Test(
      "Every method, kind of memory and kind of guest is among the cases",
      .enabled(
        if: cases.count == TrackingCase.all.count,
        """
        this machine lacks some: \
        \(TrackingCase.all.filter { $0.unavailability != nil }.map {
          "\($0) (\($0.unavailability ?? ""))" })
        """))
    func allCases() {
      #expect(cases.count == TrackingCase.all.count)
    }

    @Test("A bitmap holds the pages that were written and no others", arguments: cases)
    func exact(_ kind: TrackingCase) throws {
      let subject = try Subject(kind)
      let tracker = try subject.track()
      try tracker.start()
      try subject.expectExact(
        tracker, writing: [600..<640, 1100..<1101, 1727..<1793, 4095..<4096], seed: 1)
      try subject.expectExact(tracker, writing: [], seed: 2)
      // The same again: collecting has armed them again.
      try subject.expectExact(tracker, writing: [630..<650, 1100..<1101], seed: 3)
      tracker.stop()
    }

    @Test("Pages that were absent when they were armed are tracked", arguments: cases)
    func absent(_ kind: TrackingCase) throws {
      let subject = try Subject(kind, fill: false)
      let tracker = try subject.track()
      try tracker.start()
      try subject.expectExact(tracker, writing: [600..<640, 2047..<2050], seed: 1)
      try subject.expectExact(tracker, writing: [620..<660, 3000..<3001], seed: 2)
      tracker.stop()
      #expect(try subject.guest.run(.fill(seed: 9)).pages == 3840)
    }

    @Test(
      "Pages that are only read are not reported",
      arguments: cases.filter { $0.method == .writeProtect || $0.method == .async }, [true, false])
    func reads(_ kind: TrackingCase, _ fill: Bool) throws {
      let subject = try Subject(kind, fill: fill)
      let tracker = try subject.track()
      try tracker.start()
      #expect(try subject.guest.run(.touch(order: .random)).pages == 3840)
      #expect(try tracker.collect().count(in: kind.firstQuietPage..<4096) == 0)
      // Reading has not disarmed them.
      try subject.expectExact(tracker, writing: [700..<800], seed: 1)
      tracker.stop()
    }

    @Test(
      "A copy that follows the bitmaps of a guest that writes as fast as it can is complete",
      .timeLimit(.minutes(10)), arguments: cases, [1, 2])
    func nothingIsLost(_ kind: TrackingCase, _ vcpus: Int) throws {
      let subject = try Subject(kind, vcpus: vcpus)
      let tracker = try subject.track()
      for cycle in 0..<3 {
        try subject.guest.start(.dirty(seed: UInt64(cycle)), WorkloadOptions(batch: 16))
        try tracker.start()
        let mirror = try Mirror(of: subject.range)
        var union = DirtyBitmap(pageCount: subject.pageCount)
        for round in 0..<40 {
          let dirty = try tracker.collect()
          mirror.update(dirty)
          union.formUnion(dirty)
          // However busy the machine is, each round has some writes.
          let batches = subject.guest.batches
          #expect(Delay.until { subject.guest.batches > batches }, "the guest stands still")
          guard round % 8 == 7 else { continue }
          subject.guest.pause()
          mirror.update(try tracker.collect())
          let lost = mirror.differences
          #expect(lost.isEmpty, "lost \(lost.prefix(10)) (\(lost.count)) in round \(round)")
          subject.guest.resume()
        }
        #expect(union.count > 300)
        tracker.stop()
        subject.guest.stop()
        _ = try subject.guest.wait()
      }
    }

    @Test("Pages whose content changed are in the union of the bitmaps", arguments: cases)
    func changesAreReported(_ kind: TrackingCase) throws {
      let subject = try Subject(kind, vcpus: 2)
      let tracker = try subject.track()
      try tracker.start()
      subject.guest.pause()
      _ = try tracker.collect()
      let before = try Mirror(of: subject.range)
      subject.guest.resume()
      try subject.guest.start(.dirty(seed: 4), WorkloadOptions(pages: 1000..<2500, batch: 16))
      var union = DirtyBitmap(pageCount: subject.pageCount)
      for _ in 0..<30 {
        Delay.microseconds(500)
        union.formUnion(try tracker.collect())
      }
      subject.guest.pause()
      union.formUnion(try tracker.collect())
      let changed = before.differences
      #expect(changed.count > 10)
      #expect(changed.filter { !union[$0] } == [])
      tracker.stop()
      subject.guest.resume()
      subject.guest.stop()
      _ = try subject.guest.wait()
    }

    @Test("Only armed pages count, from their arming on", arguments: cases)
    func piecewise(_ kind: TrackingCase) throws {
      let subject = try Subject(kind)
      let tracker = try subject.track()
      try tracker.prepare()
      try subject.write(1024..<3072, seed: 1)
      #expect(try tracker.collect().isEmpty)
      try tracker.arm(1536..<2048)
      #expect(try tracker.collect().count(in: 1024..<3072) == 0)
      try subject.write(1024..<3072, seed: 2)
      #expect(Array(try tracker.collect().ranges) == [1536..<2048])
      try subject.write(1540..<1542, seed: 3)
      // Arming what is armed forgets nothing.
      try tracker.arm(1024..<2560)
      try subject.write(2559..<2561, seed: 4)
      var expected = DirtyBitmap(pageCount: subject.pageCount)
      expected.insert(kind.rounded(1540..<1542))
      expected.insert(kind.rounded(2559..<2560))
      #expect(try tracker.collect() == expected)
      tracker.stop()
    }

    @Test("Several threads arm a guest that runs", arguments: cases)
    func concurrentArming(_ kind: TrackingCase) throws {
      let subject = try Subject(kind, mebibytes: 32)
      let tracker = try subject.track()
      try subject.guest.start(.dirty(seed: 1))
      try tracker.prepare()
      let failures = Atomic<Int>(0)
      try inThreads(4) { index in
        for piece in stride(from: index * 512, to: 8192, by: 2048) {
          do {
            try tracker.arm(piece..<piece + 512)
          } catch {
            failures.wrappingAdd(1, ordering: .relaxed)
          }
        }
      }
      #expect(failures.load(ordering: .relaxed) == 0)
      let mirror = try Mirror(of: subject.range)
      for _ in 0..<20 { mirror.update(try tracker.collect()) }
      subject.guest.pause()
      mirror.update(try tracker.collect())
      #expect(mirror.differences == [])
      tracker.stop()
      subject.guest.resume()
      subject.guest.stop()
      _ = try subject.guest.wait()
    }

    @Test(
      "Several memory slots are one bitmap",
      arguments: cases.filter { $0.backing == .anonymous && $0.kind == .kvm })
    func slots(_ kind: TrackingCase) throws {
      let subject = try Subject(kind, mebibytes: 1536, fill: false)
      let tracker = try subject.track()
      try tracker.start()
      #expect(tracker.pageCount == 393_216)
      // Slots end at 256 MiB and 1 GiB.
      try subject.expectExact(
        tracker, writing: [65_500..<65_600, 262_140..<262_150, 393_210..<393_216], seed: 1)
      tracker.stop()
    }

    @Test(
      "A ring that is full stops nobody and loses nothing",
      arguments: cases.filter {
        $0.method == .ring
      })
    func fullRing(_ kind: TrackingCase) throws {
      let subject = try Subject(kind, mebibytes: 64)
      let tracker = try subject.track()
      try tracker.start()
      // Without a collect: 16 times what the ring has room for.
      try subject.expectExact(tracker, writing: [512..<16_384], seed: 1)
      tracker.stop()
      // Nobody tracks: the ring is not in the way.
      try subject.write(512..<16_384, seed: 2)
    }
  }
}
