// SPDX-License-Identifier: Apache-2.0

import KVM
import LinuxSystem
import SystemPackage
import Userfault

/// What can be registered.
enum RegistrationScenarios {
  static var all: [Scenario] {
    [
      Scenario("missing, minor and write-protect register, in any combination") {
        let memory = try SharedGuestMemory()
        for outcome in try UserfaultProbe.outcomes(for: memory.mapping.range) {
          guard !outcome.modes.contains(.readWriteProtect) else { continue }
          guard case .success(let operations) = outcome.result else {
            throw Mismatch(description: "\(outcome.modes) was refused")
          }
          try require(operations.contains(.copy), "\(outcome.modes) offers no COPY")
          try expect(
            operations.contains(.continue), outcome.modes.contains(.minor),
            "CONTINUE with \(outcome.modes)")
        }
      },
      Scenario("memory that is not shared at creation is refused with EINVAL") {
        let memory = try SharedGuestMemory(flags: .mmap)
        try expectRefusal(memory)
      },
      Scenario("every mode is refused with EINVAL", on: [.unpatched]) {
        try expectRefusal(SharedGuestMemory(flags: [.mmap, .initShared]))
      },
      Scenario("write-protect tracking alone registers", on: [.patched, .unpatched]) {
        let memory = try SharedGuestMemory(flags: [.mmap, .initShared])
        try require(
          try UserfaultProbe.registersWriteProtectAsync(memory.mapping.range), "it was refused")
      },
      Scenario("the capabilities name what is there", on: [.patched, .unpatched]) {
        let isPatched = CommandLine.arguments.contains(LabKernel.patched.rawValue)
        let system = try KVMSystem()
        let flags = try system.capabilities().guestMemfdFlags
        try require(flags.isSuperset(of: [.mmap, .initShared]), "no INIT_SHARED")
        try expect(flags.contains(.write), isPatched, "the flag for write()")
        try expect(
          try VirtualMachine(system).value(of: .userfault), isPatched ? 1 : 0, "KVM_CAP_USERFAULT")
      },
    ]
  }

  private static func expectRefusal(_ memory: SharedGuestMemory) throws {
    for outcome in try UserfaultProbe.outcomes(for: memory.mapping.range) {
      guard case .failure(let errno) = outcome.result else {
        throw Mismatch(description: "\(outcome.modes) was accepted")
      }
      try expect(errno, .invalidArgument, "\(outcome.modes)")
    }
  }
}
