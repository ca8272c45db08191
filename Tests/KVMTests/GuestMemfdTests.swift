// SPDX-License-Identifier: Apache-2.0

import KVM
import LinuxSystem
import SystemPackage
import TestSupport
import Testing

private func hasGuestMemfd() -> Bool {
  guard let system = try? KVMSystem() else { return false }
  return (try? system.capabilities().guestMemfd) ?? false
}

@Suite(.enabled(if: hasGuestMemfd(), "no KVM with guest_memfd (Linux 6.8)"))
struct GuestMemfdTests {
  @Test(
    "Flags that the host names are taken, others are refused",
    arguments: [
      [], .mmap, [.mmap, .initShared], GuestMemfdFlags(rawValue: 1 << 63),
    ] as [GuestMemfdFlags])
  func flags(_ flags: GuestMemfdFlags) throws {
    let system = try KVMSystem()
    let supported = try system.capabilities().guestMemfdFlags
    let machine = try VirtualMachine(system)
    if supported.isSuperset(of: flags), !flags.isEmpty {
      let made = try machine.makeGuestMemfd(length: 2 << 20, flags: flags)
      #expect(made.rawValue >= 0)
    } else if !flags.isEmpty {
      #expect(throws: Errno.invalidArgument) {
        _ = try machine.makeGuestMemfd(length: 2 << 20, flags: flags)
      }
    }
  }

  @Test("A slot can be bound to a guest_memfd that is mapped and shared")
  func binding() throws {
    let system = try KVMSystem()
    let supported = try system.capabilities().guestMemfdFlags
    try #require(supported.isSuperset(of: [.mmap, .initShared]))
    let machine = try VirtualMachine(system)
    let file = try machine.makeGuestMemfd(length: 2 << 20, flags: [.mmap, .initShared])
    let mapping = try Mapping(of: file, length: 2 << 20, sharing: .shared)
    try machine.setMemory(
      slot: 0, at: GuestAddress(0), to: mapping.range, guestMemfd: file, offset: 0)
    // KVM keeps no dirty log of such a slot.
    #expect(throws: Errno.invalidArgument) {
      try machine.setMemory(
        slot: 1, at: GuestAddress(4 << 20), to: mapping.range, flags: .logDirtyPages,
        guestMemfd: file, offset: 0)
    }
    try machine.removeMemory(slot: 0)
  }

  @Test("An odd length is refused")
  func length() throws {
    let machine = try VirtualMachine(try KVMSystem())
    #expect(throws: Errno.invalidArgument) {
      _ = try machine.makeGuestMemfd(length: 4095)
    }
  }
}
