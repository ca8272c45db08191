// SPDX-License-Identifier: Apache-2.0

import CGuestProgram
import Foundation
import LinuxSystem
import SystemPackage
import TestGuest
import TestSupport
import Testing
import Userfault

private func canPoison() -> Bool {
  ((try? Userfaultfd.supportedFeatures()) ?? []).contains(.poison)
}

@Suite struct FailureTests {
  @Test(
    "A poisoned page is a memory fault that names it",
    .enabled(if: canPoison(), "no UFFDIO_POISON (Linux 6.6)"), arguments: kinds, [false, true])
  func poison(_ kind: TestGuest.Kind, _ writing: Bool) throws {
    let memory = try Memory(mebibytes: 4)
    let guest = try TestGuest(booting: memory.range, vcpus: 2, kind: kind)
    let page = 700
    let bad = HostRange(start: memory.range.start.advanced(by: page * 4096), length: 4096)
    let userfaultfd = try Userfaultfd(requiring: .poison)
    try userfaultfd.register(bad, modes: .missing)
    #expect(userfaultfd.poison(bad) == Resolution(bytesDone: 4096))
    #expect(GuardedMemory.touch(bad.start, writing: writing) == nil)
    let error = try #require(throws: GuestError.self) {
      _ = try guest.run(.touch(order: .random, writing: writing))
    }
    #expect(error.code == .memoryFault)
    #expect(error.guestAddress == GuestAddress(UInt64(page * 4096)))
    #expect(guest.failure?.code == .memoryFault)
    guest.shutdown()
  }

  @Test("A guarded touch gives the value, or nothing where there is no memory")
  func guardedTouch() throws {
    let memory = try Memory(mebibytes: 2)
    #expect(GuardedMemory.touch(memory.range.start, writing: true) == 0)
    memory.flipByte(at: 4096)
    #expect(GuardedMemory.touch(memory.range.start.advanced(by: 4096)) == 0xFF)
    #expect(GuardedMemory.touch(HostAddress(4096)) == nil)
    #expect(GuardedMemory.touch(HostAddress(4096), writing: true) == nil)
    // Again after a fault, and beyond the end of a file.
    let file = try MemoryFile(name: "short", length: 4096)
    let mapping = try Mapping(of: file.descriptor, length: 8192, sharing: .shared)
    #expect(GuardedMemory.touch(mapping.range.start) == 0)
    #expect(GuardedMemory.touch(mapping.range.start.advanced(by: 4096)) == nil)
  }

  @Test("A damaged program is a crash that names the instruction", .enabled(if: Host.hasKVM))
  func crash() throws {
    let memory = try Memory(mebibytes: 2)
    let guest = try TestGuest(booting: memory.range, kind: .kvm)
    _ = try guest.timeToFirstInstruction()
    // ud2 in every byte pair of the program.
    for offset in 0..<cguest_program_size() {
      // SAFETY: the program lies within the mapping.
      unsafe memory.mapping.pointer.storeBytes(
        of: offset % 2 == 0 ? 0x0F : 0x0B, toByteOffset: Int(CGUEST_PROGRAM) + offset,
        as: UInt8.self)
    }
    let error = try #require(throws: GuestError.self) { _ = try guest.run(.fill(seed: 1)) }
    #expect(error.code == .crashed)
    #expect(error.description.contains("instruction 0x"))
    guest.shutdown()
  }

  @Test("Guests leave no descriptors behind", .enabled(if: Host.hasKVM))
  func descriptors() async throws {
    await #expect(processExitsWith: .success) {
      let memory = try Memory(mebibytes: 4)
      for _ in 0..<3 {
        let guest = try TestGuest(booting: memory.range, vcpus: 3, kind: .kvm)
        precondition(openDescriptors(of: "kvm") == 4)
        _ = try guest.run(.touch(order: .random, timed: true))
        guest.pause()
        let states = try guest.saveState()
        guest.shutdown()
        precondition(openDescriptors(of: "kvm") == 0)
        let other = try TestGuest(restoring: memory.range, states: states, kind: .kvm)
        try other.start(.counter())
        other.shutdown()
        precondition(openDescriptors(of: "kvm") == 0)
      }
    }
  }
}
