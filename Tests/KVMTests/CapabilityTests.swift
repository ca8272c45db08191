// SPDX-License-Identifier: Apache-2.0

import KVM
import TestSupport
import Testing

@Suite(.enabled(if: Host.hasKVM, "no usable /dev/kvm"))
struct CapabilityTests {
  @Test("The host says what it can do")
  func capabilities() throws {
    let system = try KVMSystem()
    let capabilities = try system.capabilities()
    #expect(capabilities.maximumVCPUs >= 1)
    #expect(capabilities.memorySlots >= 32)
    #expect(capabilities.vmTypes & 1 == 1)
    if capabilities.guestMemfd { #expect(capabilities.userMemory2) }
    #expect(try system.supportedCPUID().entries.contains { $0.function == 1 })
    // IA32_TSC is part of every vCPU.
    #expect(try system.stateMSRs().contains(0x10))
  }
}
