// SPDX-License-Identifier: Apache-2.0

import KVM
import TestSupport
import Testing

private func canMapGuestMemfd() -> Bool {
  guard let system = try? KVMSystem() else { return false }
  return (try? system.capabilities().guestMemfdFlags.isSuperset(of: [.mmap, .initShared])) ?? false
}

@Suite(
  "restore into guest_memfd", .enabled(if: canMapGuestMemfd(), "no mappable guest_memfd (6.18)"))
struct GuestMemfdTests {
  @Test("Ahead of time, the guest finds every page right")
  func aheadOfTime() throws {
    try withImage(mebibytes: 16, guest: "kvm") { image in
      let restored: Restored = try image.restore(
        "--json", "--backing", "guest_memfd", "--guest-memfd", "ahead-of-time"
      ).json()
      #expect(restored.guestMemfd == "ahead-of-time")
      #expect(restored.verifiedPages == 3840)
      #expect(restored.wrongPages == 0)
      #expect(restored.faults == 0)
    }
  }

  @Test("Ahead of time, a damaged block refuses the restore: nothing could be poisoned")
  func damaged() throws {
    try withImage(mebibytes: 16, guest: "kvm") { image in
      let block = try image.damageBlock(from: 1000)
      try image.restore("--backing", "guest_memfd", "--guest-memfd", "ahead-of-time")
        .expectFailure(1, saying: [image.path, "block \(block)", "checksum"])
    }
  }

  @Test("Without a strategy the best one that works is taken and named")
  func automatic() throws {
    try withImage(mebibytes: 4, guest: "kvm") { image in
      let outcome = try image.restore("--backing", "guest_memfd")
      #expect(outcome.ending == .exit(0))
      #expect(outcome.errors.hasPrefix("faultline: guest_memfd "))
    }
  }

  @Test("A strategy without guest_memfd, and a snapshot with it, are wrong usage")
  func usage() throws {
    #expect(
      try faultline(["restore", "x", "--guest-memfd", "two-way"]).ending == .exit(64))
    #expect(
      try faultline(["snapshot", "-o", "x", "--backing", "guest_memfd"]).ending == .exit(64))
  }

  @Test("A process guest is refused")
  func processGuest() throws {
    try withImage(mebibytes: 4, guest: "process") { image in
      let outcome = try image.restore("--backing", "guest_memfd")
      #expect(outcome.ending == .exit(1))
      #expect(outcome.errors.contains("guest_memfd is for KVM guests"))
    }
  }
}
