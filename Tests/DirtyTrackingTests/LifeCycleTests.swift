// SPDX-License-Identifier: Apache-2.0

import GuestMemory
import LinuxSystem
import TestGuest
import TestSupport
import Testing

extension DirtyTrackingTests {
  @Suite("Tracking begins, ends, and leaves nothing behind")
  struct DirtyLifeCycleTests {
    /// The shortest time for 8 writes to each page, in nanoseconds.
    private func writeTime(_ subject: Subject) throws -> UInt64 {
      var best = UInt64.max
      for _ in 0..<4 {
        let report = try subject.guest.run(
          .dirty(seed: 1, generations: 8), WorkloadOptions(batch: 1 << 20))
        best = min(best, report.elapsedNanoseconds)
      }
      return best
    }

    @Test("After stop the guest writes as fast as before", arguments: cases)
    func fullSpeed(_ kind: TrackingCase) throws {
      let subject = try Subject(kind)
      let tracker = try subject.track()
      let before = try writeTime(subject)
      try tracker.start()
      try subject.write(300..<2000, seed: 1)
      _ = try tracker.collect()
      tracker.stop()
      // Other work on the machine may get in between; faults would cost a hundred times more.
      #expect(try writeTime(subject) < before * 10 + 1_000_000)
    }

    @Test("Tracking leaves no descriptor and no thread behind", .timeLimit(.minutes(10)))
    func leavesNothingBehind() async {
      await #expect(processExitsWith: .success) {
        for kind in cases {
          let subject = try Subject(kind)
          let tracker = try subject.track()
          func cycle() throws {
            try tracker.start()
            try subject.write(300..<400, seed: 1)
            _ = try tracker.collect()
            tracker.stop()
          }
          try cycle()
          let before = openDescriptorCount()
          for _ in 0..<5 { try cycle() }
          precondition(openDescriptorCount() == before, "descriptors leak: \(kind)")
          precondition(openDescriptors(of: "userfaultfd") == 0, "a userfaultfd is left: \(kind)")
          precondition(openDescriptors(of: "pagemap") == 0, "a page map is left: \(kind)")
          precondition(
            Delay.until { Host.threads(named: WriteProtectTracking.threadName) == 0 },
            "a thread is left: \(kind)")
        }
      }
    }

    @Test("A tracker that is dropped stops", arguments: cases)
    func dropped(_ kind: TrackingCase) throws {
      let subject = try Subject(kind)
      var tracker: (any DirtyTracking)? = try subject.track()
      try tracker?.start()
      try subject.write(300..<310, seed: 1)
      tracker = nil
      try subject.write(300..<2000, seed: 2)
      // Another one finds everything free.
      let second = try subject.track()
      try second.start()
      try subject.expectExact(second, writing: [700..<720], seed: 3)
      second.stop()
    }

    @Test("Stopping while the guest writes as fast as it can holds nobody up", arguments: cases)
    func stopUnderLoad(_ kind: TrackingCase) throws {
      let subject = try Subject(kind, vcpus: 2)
      let tracker = try subject.track()
      try subject.guest.start(.dirty(seed: 1))
      for _ in 0..<20 {
        try tracker.start()
        Delay.microseconds(500)
        _ = try tracker.collect()
        tracker.stop()
        let batches = subject.guest.batches
        #expect(Delay.until { subject.guest.batches > batches + 4 }, "a vCPU stands still")
      }
      subject.guest.stop()
      let report = try subject.guest.wait()
      #expect(
        try subject.guest.run(.verify(seed: 1, dirtied: report.dirtied)).pages == 3840)
    }

    @Test("Calls out of order are errors that say what to do", arguments: cases)
    func outOfOrder(_ kind: TrackingCase) throws {
      let subject = try Subject(kind)
      let tracker = try subject.track()
      func expect(_ code: DirtyTrackingError.Code, _ body: () throws -> Void) {
        let error = #expect(throws: DirtyTrackingError.self) { try body() }
        #expect(error?.code == code)
      }
      expect(.wrongState) { _ = try tracker.collect() }
      expect(.wrongState) { try tracker.arm(0..<1) }
      tracker.stop()
      try tracker.start()
      expect(.wrongState) { try tracker.prepare() }
      expect(.invalidArgument) { try tracker.arm(4000..<4097) }
      expect(.invalidArgument) {
        var small = DirtyBitmap(pageCount: 64)
        try tracker.collect(into: &small)
      }
      try subject.expectExact(tracker, writing: [900..<901], seed: 1)
      tracker.stop()
      expect(.wrongState) { _ = try tracker.collect() }
      try tracker.start()
      try subject.expectExact(tracker, writing: [1900..<1901], seed: 1)
      tracker.stop()
    }

    @Test(
      "Memory that another userfaultfd has is refused, and stays as it is",
      arguments: cases.filter { $0.method == .writeProtect || $0.method == .async })
    func busy(_ kind: TrackingCase) throws {
      let subject = try Subject(kind)
      let first = try subject.track()
      let second = try subject.track()
      try first.start()
      #expect {
        try second.start()
      } throws: {
        ($0 as? DirtyTrackingError)?.code == .unavailable
      }
      try subject.expectExact(first, writing: [900..<910], seed: 1)
      first.stop()
      try second.start()
      second.stop()
    }

    @Test("A guest says which methods it has not, and why", .enabled(if: Host.hasKVM, "no KVM"))
    func unavailable() throws {
      let plain = try Subject(TrackingCase(method: .log, backing: .anonymous, kind: .kvm))
      #expect(plain.guest.unavailability(of: .ring, backing: .anonymous) != nil)
      #expect(throws: DirtyTrackingError.self) {
        _ = try plain.guest.makeDirtyTracking(.ring, backing: .anonymous)
      }
      let ring = try Subject(TrackingCase(method: .ring, backing: .anonymous, kind: .kvm))
      #expect(ring.guest.unavailability(of: .log, backing: .anonymous) != nil)
      #expect(try ring.guest.makeDirtyTracking(backing: .anonymous).method == .ring)
      let process = try Subject(
        TrackingCase(method: .async, backing: .anonymous, kind: .process))
      #expect(process.guest.unavailability(of: .log, backing: .anonymous) != nil)
      #expect(process.guest.unavailability(of: .async, backing: .guestMemfd) != nil)
    }
  }
}
