// SPDX-License-Identifier: Apache-2.0

import LinuxSystem
import TestGuest
import TestSupport
import Testing

@Suite struct SnapshotTests {
  /// Starts a workload, saves it after some batches, and goes on in a copy.
  private func moved(
    _ guest: TestGuest, _ memory: Memory, after batches: UInt64
  ) throws -> (guest: TestGuest, memory: Memory) {
    #expect(Delay.until { guest.batches >= batches })
    guest.pause()
    let states = try guest.saveState()
    let copy = try memory.copy()
    guest.shutdown()
    return (try TestGuest(restoring: copy.range, states: states, kind: guest.kind), copy)
  }

  @Test(
    "A counter that was saved on the way ends at exactly its number", .timeLimit(.minutes(10)),
    arguments: kinds, [1, 3])
  func counter(_ kind: TestGuest.Kind, _ vcpus: Int) throws {
    var memory = try Memory(mebibytes: 2)
    var guest = try TestGuest(booting: memory.range, vcpus: vcpus, kind: kind)
    let increments: UInt64 = 4_000_000
    try guest.start(
      .counter(increments: increments), WorkloadOptions(batch: 20_000, interval: 200_000))
    for step in 1...5 {
      (guest, memory) = try moved(guest, memory, after: UInt64(step * 10 * vcpus))
    }
    let report = try guest.wait()
    #expect(report.counters == Array(repeating: increments, count: vcpus))
    #expect(!report.wasStopped)
    guest.shutdown()
  }

  @Test(
    "Pages that were being dirtied verify in the copy", .timeLimit(.minutes(10)),
    arguments: kinds)
  func dirty(_ kind: TestGuest.Kind) throws {
    var memory = try Memory(mebibytes: 4)
    var guest = try TestGuest(booting: memory.range, vcpus: 2, kind: kind)
    _ = try guest.run(.fill(seed: 5))
    try guest.start(
      .dirty(seed: 5), WorkloadOptions(pages: 300..<900, batch: 64, interval: 100_000))
    for step in 1...4 {
      (guest, memory) = try moved(guest, memory, after: UInt64(step * 20))
    }
    #expect(Delay.until { guest.batches > 120 })
    guest.stop()
    let report = try guest.wait()
    #expect(report.wasStopped)
    #expect(report.dirtied.map(\.pages) == [300..<600, 600..<900])
    let verified = try guest.run(.verify(seed: 5, order: .random, dirtied: report.dirtied))
    #expect(verified.pages == 768)
    #expect(verified.wrongPages == 0)
    // It goes on where it was.
    try guest.start(
      .dirty(seed: 5, continuing: report.dirtied), WorkloadOptions(pages: 300..<900))
    #expect(Delay.until { guest.batches > 10 })
    guest.stop()
    let second = try guest.wait().dirtied
    #expect(try guest.run(.verify(seed: 5, dirtied: second)).wrongPages == 0)
    // A page that falls behind by a generation is found.
    var behind = second
    behind[0].generation += 1
    #expect(try guest.run(.verify(seed: 5, dirtied: behind)).wrongPages == 300)
    guest.shutdown()
  }

  @Test("An idle guest can be saved, and works in the copy", arguments: kinds)
  func idle(_ kind: TestGuest.Kind) throws {
    let memory = try Memory(mebibytes: 8)
    let guest = try TestGuest(booting: memory.range, vcpus: 2, kind: kind)
    _ = try guest.run(.fill(seed: 9))
    let (restored, copy) = try moved(guest, memory, after: 0)
    #expect(try restored.timeToFirstInstruction() > 0)
    let report = try restored.run(.verify(seed: 9))
    #expect(report.wrongPages == 0)
    #expect(report.pages == 1792)
    restored.shutdown()
    #expect(copy.workloadPagesEqual(memory))
  }

  @Test("Hundreds of pauses lose no increment", .timeLimit(.minutes(10)), arguments: kinds)
  func pauses(_ kind: TestGuest.Kind) throws {
    let memory = try Memory(mebibytes: 2)
    let guest = try TestGuest(booting: memory.range, vcpus: 2, kind: kind)
    try guest.start(
      .counter(increments: 3_000_000), WorkloadOptions(batch: 5_000, interval: 20_000))
    for _ in 0..<300 {
      guest.pause()
      guest.resume()
    }
    #expect(try guest.wait().counters == [3_000_000, 3_000_000])
    guest.shutdown()
  }

  @Test("Damaged states are refused at every length, or the guest fails with an error")
  func damage() throws {
    let memory = try Memory(mebibytes: 2)
    for kind in kinds {
      let guest = try TestGuest(booting: memory.range, vcpus: 1, kind: kind)
      try guest.start(.counter())
      #expect(Delay.until { guest.batches > 2 })
      guest.pause()
      let bytes = try #require(try guest.saveState().first)
      guest.shutdown()
      for length in bytes.indices {
        #expect {
          _ = try TestGuest(
            restoring: memory.range, states: [Array(bytes.prefix(length))], kind: kind)
        } throws: {
          ($0 as? GuestError)?.code == .damagedState
        }
      }
      for _ in 0..<100 {
        var damaged = bytes
        damaged[Int.random(in: bytes.indices)] ^= 1 << UInt8.random(in: 0..<8)
        let other = try? TestGuest(restoring: memory.range, states: [damaged], kind: kind)
        other?.shutdown()
      }
    }
  }

  @Test("A state of another kind of guest or memory is refused", arguments: kinds)
  func mismatch(_ kind: TestGuest.Kind) throws {
    let memory = try Memory(mebibytes: 4)
    let guest = try TestGuest(booting: memory.range, vcpus: 1, kind: kind)
    guest.pause()
    let states = try guest.saveState()
    guest.shutdown()
    let half = HostRange(start: memory.range.start, length: 2 << 20)
    let other: TestGuest.Kind = kind == .kvm ? .process : .kvm
    #expect(throws: GuestError.self) {
      _ = try TestGuest(restoring: half, states: states, kind: kind)
    }
    #expect(throws: GuestError.self) {
      _ = try TestGuest(restoring: memory.range, states: states + states, kind: kind)
    }
    #expect(throws: GuestError.self) {
      _ = try TestGuest(restoring: memory.range, states: states, kind: other)
    }
  }
}
