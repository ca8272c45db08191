// SPDX-License-Identifier: Apache-2.0

internal import GuestMemory
internal import KVM
internal import LinuxSystem
public import Snapshot
internal import SystemPackage
internal import TestGuest
internal import Userfault

/// How a guest whose memory is a guest_memfd gets its pages.
public enum GuestMemfdStrategy: String, Sendable, CaseIterable {
  /// Memory slots are bound to the guest_memfd: vCPUs ask through the userfault bitmap and
  /// are answered by write(), user faults by UFFDIO_COPY and UFFDIO_CONTINUE. Needs
  /// Faultline's kernel series (kernel/README.md).
  case threeWay = "three-way"
  /// Memory slots use the user mapping, so every fault goes through userfaultfd. Needs the
  /// first three patches of the series.
  case twoWay = "two-way"
  /// Everything is filled before the guest runs. Needs Linux 6.18.
  case aheadOfTime = "ahead-of-time"

  /// The best one here, and why, found by trying.
  ///
  /// Throws `.memory` where not even `aheadOfTime` works, with the reason.
  public static func probe() throws(SnapshotError) -> (strategy: Self, reason: String) {
    let offered: GuestMemfdFlags
    let hasBitmap: Bool
    let registers: Bool
    do {
      let system = try KVMSystem()
      offered = try system.capabilities().guestMemfdFlags
      guard offered.isSuperset(of: [.mmap, .initShared]) else {
        throw SnapshotError(
          .memory, "KVM here cannot map guest_memfd (flags: \(offered)); Linux 6.18 can")
      }
      let machine = try VirtualMachine(system)
      hasBitmap = try machine.value(of: .userfault) == 1
      let file = try machine.makeGuestMemfd(length: 4096, flags: [.mmap, .initShared])
      let memory = try GuestMemoryObject(guestMemfd: file, length: 4096)
      let outcomes = try UserfaultProbe.outcomes(for: memory.range)
      registers = outcomes.contains { outcome in
        guard outcome.modes == [.missing, .minor] else { return false }
        if case .success = outcome.result { return true } else { return false }
      }
    } catch let error as SnapshotError {
      throw error
    } catch {
      throw SnapshotError(.memory, "guest_memfd cannot be probed: \(error)")
    }
    guard registers else {
      return (.aheadOfTime, "this kernel's userfaultfd refuses guest_memfd")
    }
    guard hasBitmap, offered.contains(.write) else {
      return (.twoWay, "KVM here has no userfault bitmap or no write() to guest_memfd")
    }
    return (.threeWay, "this kernel has Faultline's guest_memfd series")
  }
}
