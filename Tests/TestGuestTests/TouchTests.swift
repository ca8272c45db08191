// SPDX-License-Identifier: Apache-2.0

import CGuestProgram
import LinuxSystem
import TestGuest
import TestSupport
import Testing

@Suite struct TouchTests {
  @Test("Touching leaves the content, and a permutation times each page once", arguments: kinds)
  func touch(_ kind: TestGuest.Kind) throws {
    let memory = try Memory(mebibytes: 8)
    let guest = try TestGuest(booting: memory.range, vcpus: 2, kind: kind)
    _ = try guest.run(.fill(seed: 2))
    for order in [PageOrder.sequential, .random, .zipf(touches: 5000)] {
      for writing in [false, true] {
        let report = try guest.run(.touch(order: order, writing: writing, timed: true))
        let expected = if case .zipf(let touches) = order { touches } else { 1792 }
        #expect(report.pages == UInt64(expected))
        #expect(report.samples.count == expected)
        #expect(report.samples.allSatisfy { $0 > 0 })
      }
    }
    #expect(try guest.run(.touch(order: .random)).samples.isEmpty)
    #expect(try guest.run(.verify(seed: 2)).wrongPages == 0)
    guest.shutdown()
  }

  @Test("KVM and process guests fill memory with the same bytes", .enabled(if: Host.hasKVM))
  func agreement() throws {
    let (one, other) = (try Memory(mebibytes: 16), try Memory(mebibytes: 16))
    let inKVM = try TestGuest(booting: one.range, vcpus: 2, kind: .kvm)
    let inProcess = try TestGuest(booting: other.range, vcpus: 1, kind: .process)
    _ = try inKVM.run(.fill(seed: 11))
    _ = try inProcess.run(.fill(seed: 11))
    #expect(one.workloadPagesEqual(other))
    _ = try inKVM.run(.dirty(seed: 11, generations: 3))
    _ = try inProcess.run(.dirty(seed: 11, generations: 3))
    #expect(one.workloadPagesEqual(other))
    inKVM.shutdown()
    inProcess.shutdown()
  }

  @Test("The content has zero pages, duplicates, and compressible and random ones")
  func classes() throws {
    let memory = try Memory(mebibytes: 16)
    let guest = try TestGuest(booting: memory.range, kind: .process)
    _ = try guest.run(.fill(seed: 1))
    guest.shutdown()
    var (zero, compressible) = (0, 0)
    var contents: [[UInt8]: Int] = [:]
    for page in 256..<4096 {
      let bytes = (0..<64).map { memory.byte(at: page * 4096 + $0) }
      if bytes.allSatisfy({ $0 == 0 }) {
        zero += 1
        continue
      }
      // One byte of eight.
      if (0..<64).allSatisfy({ $0 % 8 == 0 || bytes[$0] == 0 }) { compressible += 1 }
      contents[bytes, default: 0] += 1
    }
    let duplicates = contents.values.filter { $0 > 1 }
    let eighth = 3840 / 8
    #expect((eighth - 100...eighth + 100).contains(zero))
    #expect((2 * eighth - 150...2 * eighth + 150).contains(compressible))
    #expect(duplicates.count == 16)
    #expect((eighth - 100...eighth + 100).contains(duplicates.reduce(0, +)))
  }

  @Test("Workloads that the guest cannot do are refused", arguments: kinds)
  func refusals(_ kind: TestGuest.Kind) throws {
    let memory = try Memory(mebibytes: 2)
    let guest = try TestGuest(booting: memory.range, kind: kind)
    for pages in [0..<300, 300..<513] {
      #expect(throws: GuestError.self) {
        _ = try guest.run(.fill(seed: 1), WorkloadOptions(pages: pages))
      }
    }
    #expect(throws: GuestError.self) {
      _ = try guest.run(.verify(seed: 1, order: .zipf(touches: 1)))
    }
    #expect(throws: GuestError.self) { _ = try guest.wait() }
    #expect(throws: GuestError.self) { _ = try guest.saveState() }
    try guest.start(.counter())
    #expect(throws: GuestError.self) { try guest.start(.counter()) }
    guest.stop()
    #expect(try guest.wait().wasStopped)
    guest.shutdown()
    #expect(throws: GuestError.self) { try guest.start(.counter()) }
    for length in [0, 1 << 20, 3 << 20] {
      #expect(throws: GuestError.self) {
        _ = try TestGuest(
          booting: HostRange(start: memory.range.start, length: length), kind: kind)
      }
    }
  }

  @Test("The program fits between its address and the mailboxes")
  func programSize() {
    #expect(cguest_program_size() <= Int(CGUEST_MAILBOX - CGUEST_PROGRAM))
    #expect(cguest_program_entry_offset() < cguest_program_size())
  }
}
