// SPDX-License-Identifier: Apache-2.0

import CTestSupport
import LinuxSystem
import TestSupport
import Testing

@testable import Userfault

/// Why a duplicate of a descriptor is not taken for a userfaultfd.
private func refusal(_ descriptor: borrowing OwnedDescriptor) -> UserfaultError? {
  guard let copy = try? descriptor.duplicate() else { return nil }
  do throws(UserfaultError) {
    _ = try Userfaultfd(receiving: copy)
    return nil
  } catch { return error }
}

@Suite("A userfaultfd that somebody else sent is looked at before it is believed")
struct ReceivedTests {
  @Test("Its features are those that its owner negotiated, and POISON where the kernel has it")
  func features() throws {
    let original = try Userfaultfd(requiring: [.removeEvents, .missingShmem])
    let received = try Userfaultfd(receiving: original.descriptor.duplicate())
    let poison = try Userfaultfd.supportedFeatures().intersection(.poison)
    #expect(received.features == poison.union([.removeEvents, .missingShmem]))
    let bare = try Userfaultfd()
    let second = try Userfaultfd(receiving: bare.descriptor.duplicate())
    #expect(second.features == poison)
  }

  @Test("POISON works without being negotiated", .enabled(if: Host.has(.poison), "needs 6.6"))
  func poison() throws {
    let memory = try Mapping(anonymous: 4096)
    let userfaultfd = try Userfaultfd(requiring: .removeEvents)
    try userfaultfd.register(memory.range, modes: .missing)
    #expect(userfaultfd.poison(memory.range) == Resolution(bytesDone: 4096))
    #expect(guardedLoad(memory.range, offset: 0) == .busError)
  }

  @Test("A process that may not make one learns of POISON, too")
  func forbidden() async {
    await #expect(processExitsWith: .success) {
      let supported = try Userfaultfd.supportedFeatures()
      let original = try Userfaultfd(requiring: .removeEvents)
      let copy = try original.descriptor.duplicate()
      precondition(ctest_forbid_userfaultfd() == 0)
      for userModeOnly in [true, false] {
        for origin in Userfaultfd.Origin.allCases {
          let made = try? Userfaultfd.supportedFeatures(origin: origin, userModeOnly: userModeOnly)
          precondition(made == nil, "the filter does nothing")
        }
      }
      let received = try Userfaultfd(receiving: copy)
      precondition(received.features == supported.intersection(.poison).union(.removeEvents))
      let memory = try Mapping(anonymous: 4096)
      try received.register(memory.range, modes: .missing)
      let poisoned = received.poison(memory.range).obstacle == nil
      precondition(poisoned == supported.contains(.poison))
    }
  }

  @Test("Anything else is refused by its name and closed")
  func otherKinds() async {
    await #expect(processExitsWith: .success) {
      let file = try MemoryFile(name: "anon_inode:[userfaultfd]", length: 4096)
      let memfd = refusal(file.descriptor)
      precondition(memfd?.code == .notUserfaultfd)
      precondition(memfd?.description.contains("memfd:anon_inode") == true)
      precondition(openDescriptors(of: "memfd:anon_inode") == 1)
      let stop = try EventDescriptor()
      let event = refusal(stop.descriptor)
      precondition(event?.code == .notUserfaultfd)
      precondition(event?.description.contains("eventfd") == true)
    }
  }

  @Test("What was not initialised is refused")
  func notInitialised() {
    #expect(Userfaultfd.features("pending:\t0\ntotal:\t0\nAPI:\taa:8:1ff\n") == nil)
    #expect(
      Userfaultfd.features("API:\taa:80000008:80000000000000ff\n") == .removeEvents)
    #expect(
      Userfaultfd.features("API:\taa:80000008:80000000000001ff\n") == [.removeEvents, .poison])
    for text in ["", "API:", "API:\taa", "API:\taa:zz:1", "pending:\t0\n"] {
      #expect(Userfaultfd.features(text) == nil)
    }
  }
}
