// SPDX-License-Identifier: Apache-2.0

internal import CLinux

/// A capability number, as KVM_CHECK_EXTENSION takes it (api.rst, section 4.4).
public struct KVMExtension: RawRepresentable, Hashable, Sendable {
  /// The KVM_CAP_ number.
  public let rawValue: Int

  /// Any number, also one that this file does not name.
  public init(rawValue: Int) { self.rawValue = rawValue }

  private init(_ number: CInt) { rawValue = Int(number) }

  /// KVM_CAP_IMMEDIATE_EXIT: `kvm_run.immediate_exit` works.
  public static let immediateExit = Self(KVM_CAP_IMMEDIATE_EXIT)
  /// KVM_CAP_USER_MEMORY2: KVM_SET_USER_MEMORY_REGION2.
  public static let userMemory2 = Self(KVM_CAP_USER_MEMORY2)
  /// KVM_CAP_MEMORY_FAULT_INFO: exit 39 tells which memory a fault was about.
  public static let memoryFaultInfo = Self(KVM_CAP_MEMORY_FAULT_INFO)
  /// KVM_CAP_GUEST_MEMFD: KVM_CREATE_GUEST_MEMFD.
  public static let guestMemfd = Self(KVM_CAP_GUEST_MEMFD)
  /// KVM_CAP_GUEST_MEMFD_FLAGS: the flags that KVM_CREATE_GUEST_MEMFD takes.
  public static let guestMemfdFlags = Self(KVM_CAP_GUEST_MEMFD_FLAGS)
  /// KVM_CAP_USERFAULT: slots with a `UserfaultBitmap`. No released kernel has it;
  /// Faultline's kernel series does.
  public static let userfault = Self(rawValue: 252)
  /// KVM_CAP_DIRTY_LOG_RING: the largest ring in bytes, on strongly ordered machines.
  public static let dirtyRing = Self(KVM_CAP_DIRTY_LOG_RING)
  /// KVM_CAP_DIRTY_LOG_RING_ACQ_REL: the largest ring in bytes, on any machine.
  public static let dirtyRingAcquireRelease = Self(KVM_CAP_DIRTY_LOG_RING_ACQ_REL)
  /// KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2: the flags that it takes.
  public static let manualDirtyLogProtect = Self(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2)
  /// KVM_CAP_MAX_VCPUS.
  public static let maximumVCPUs = Self(KVM_CAP_MAX_VCPUS)
  /// KVM_CAP_NR_VCPUS: how many are recommended.
  public static let recommendedVCPUs = Self(KVM_CAP_NR_VCPUS)
  /// KVM_CAP_NR_MEMSLOTS.
  public static let memorySlots = Self(KVM_CAP_NR_MEMSLOTS)
  /// KVM_CAP_VM_TYPES: a bit for each type that KVM_CREATE_VM takes.
  public static let vmTypes = Self(KVM_CAP_VM_TYPES)
  /// KVM_CAP_XSAVE2: bytes of the extended state.
  public static let extendedStateSize = Self(KVM_CAP_XSAVE2)
  /// KVM_CAP_TSC_CONTROL: the TSC's rate can be set.
  public static let tscControl = Self(KVM_CAP_TSC_CONTROL)
}

/// What this host's KVM offers, as far as it matters for moving memory.
public struct KVMCapabilities: Hashable, Sendable {
  /// guest_memfd exists (Linux 6.8).
  public let guestMemfd: Bool
  /// The creation flags that it takes (Linux 6.18).
  public let guestMemfdFlags: GuestMemfdFlags
  /// Slots can be bound to a guest_memfd (Linux 6.8).
  public let userMemory2: Bool
  /// A fault that KVM cannot resolve names its address (Linux 6.8).
  public let memoryFaultInfo: Bool
  /// Entries of the largest dirty ring; 0 when there is none (Linux 5.11).
  public let dirtyRingEntries: Int
  /// Getting the dirty log and clearing it are two steps, and which flags they take
  /// (Linux 5.1).
  public let manualDirtyLogProtect: ManualDirtyLogProtect
  /// The most vCPUs of a machine.
  public let maximumVCPUs: Int
  /// The most memory slots of a machine.
  public let memorySlots: Int
  /// A bit for each type that KVM_CREATE_VM takes; bit 0 is the default type.
  public let vmTypes: UInt64
}
