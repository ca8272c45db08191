// SPDX-License-Identifier: Apache-2.0

internal import CLinux
public import LinuxSystem
public import SystemPackage

/// A virtual machine (api.rst, KVM_CREATE_VM). The kernel keeps it until the last of
/// its descriptors is closed, those of its vCPUs included.
///
/// Memory of slots is not owned: keep it mapped as long as a vCPU may run.
public struct VirtualMachine: ~Copyable, Sendable {
  /// KVM_CREATE_VM's argument on x86.
  public struct Kind: RawRepresentable, Hashable, Sendable {
    /// The KVM_X86_ number.
    public let rawValue: UInt64
    /// Any number, also one that this file does not name.
    public init(rawValue: UInt64) { self.rawValue = rawValue }
    /// An ordinary machine.
    public static let standard = Self(rawValue: 0)
    /// KVM_X86_SW_PROTECTED_VM: private memory without hardware, for development.
    public static let softwareProtected = Self(rawValue: UInt64(KVM_X86_SW_PROTECTED_VM))
  }

  /// The machine's descriptor.
  public let descriptor: OwnedDescriptor
  /// Bytes of `kvm_run` with its data pages.
  let runSize: Int
  /// Bytes of a vCPU's extended state.
  let extendedStateSize: Int

  /// A machine without memory and vCPUs. Throws `invalidArgument` for a type that the
  /// host lacks (`KVMCapabilities.vmTypes`).
  public init(_ system: borrowing KVMSystem, kind: Kind = .standard) throws(Errno) {
    let runSize = try system.vcpuMappingSize()
    // KVM_CREATE_VM may be interrupted while it waits for memory.
    let made = try retryingInterrupted {
      clinux_kvm_create_vm(system.descriptor.rawValue, UInt(kind.rawValue))
    }
    let descriptor = OwnedDescriptor(owning: CInt(made))
    let answer = clinux_kvm_check_extension(
      descriptor.rawValue, KVMExtension.extendedStateSize.rawValue)
    self.runSize = runSize
    // Hosts before KVM_CAP_XSAVE2 answer 0 and have the classic 4096 bytes.
    self.extendedStateSize = max(answer, MemoryLayout<kvm_xsave>.size)
    self.descriptor = descriptor
  }

  /// KVM_CHECK_EXTENSION asked of this machine; some answers depend on its type.
  public borrowing func value(of extension: KVMExtension) throws(Errno) -> Int {
    try check(clinux_kvm_check_extension(descriptor.rawValue, `extension`.rawValue))
  }

  /// KVM_ENABLE_CAP.
  borrowing func enable(_ extension: KVMExtension, _ argument: UInt64) throws(Errno) {
    var request = kvm_enable_cap()
    request.cap = UInt32(`extension`.rawValue)
    request.args.0 = argument
    _ = unsafe try check(clinux_kvm_enable_cap(descriptor.rawValue, &request))
  }

  // MARK: - Memory slots

  /// KVM_MEM_ flags of a slot.
  public struct SlotFlags: OptionSet, Hashable, Sendable {
    /// The bits.
    public let rawValue: UInt32
    /// Any bits, also unknown ones.
    public init(rawValue: UInt32) { self.rawValue = rawValue }
    /// KVM_MEM_LOG_DIRTY_PAGES: note which pages the guest writes to.
    public static let logDirtyPages = Self(rawValue: 1 << 0)
    /// KVM_MEM_READONLY: writes become MMIO exits.
    public static let readOnly = Self(rawValue: 1 << 1)
    static let guestMemfd = Self(rawValue: 1 << 2)
    static let userfault = Self(rawValue: 1 << 3)
  }

  /// Gives the guest memory at a guest-physical address, or changes the flags of a slot
  /// that exists (KVM_SET_USER_MEMORY_REGION).
  ///
  /// KVM sets up tables for each page when it shadows page tables: about 1 ms for each
  /// GiB (docs/vcpu-state.md, "Memory slots").
  /// - Parameters:
  ///   - slot: the number of the slot.
  ///   - address: a multiple of 4 KiB.
  ///   - memory: mapped memory of this process; start and length are multiples of 4 KiB.
  public borrowing func setMemory(
    slot: UInt32, at address: GuestAddress, to memory: HostRange, flags: SlotFlags = []
  ) throws(Errno) {
    var region = kvm_userspace_memory_region(
      slot: slot, flags: flags.rawValue, guest_phys_addr: address.rawValue,
      memory_size: UInt64(memory.length), userspace_addr: memory.start.rawValue)
    _ = try retryingInterrupted { unsafe clinux_kvm_set_memory(descriptor.rawValue, &region) }
  }

  /// The same with the guest's private accesses going to a guest_memfd
  /// (KVM_SET_USER_MEMORY_REGION2 with KVM_MEM_GUEST_MEMFD, Linux 6.8).
  ///
  /// - Parameters:
  ///   - guestMemfd: KVM keeps a reference of its own.
  ///   - offset: bytes into the guest_memfd; a multiple of 4 KiB.
  ///   - userfaults: a vCPU that needs a page whose bit is set exits with `memoryFault` and
  ///     the flag `userfault`, and nothing is allocated (`KVMExtension.userfault`). Not
  ///     owned: keep it as long as the slot.
  ///   - firstBit: the bit of the slot's first page; a multiple of 64.
  public borrowing func setMemory(
    slot: UInt32, at address: GuestAddress, to memory: HostRange, flags: SlotFlags = [],
    guestMemfd: borrowing OwnedDescriptor, offset: Int, userfaults: UserfaultBitmap? = nil,
    firstBit: Int = 0
  ) throws(Errno) {
    var region = kvm_userspace_memory_region2()
    region.slot = slot
    region.flags = flags.union(.guestMemfd).rawValue
    if let userfaults {
      guard firstBit % 64 == 0, userfaults.pageCount - firstBit >= memory.length / 4096 else {
        throw .invalidArgument
      }
      region.flags |= SlotFlags.userfault.rawValue
      // `userfault_bitmap` of the kernel series takes the place of the first padding.
      region.pad2.0 = userfaults.address.rawValue + UInt64(firstBit / 8)
    }
    region.guest_phys_addr = address.rawValue
    region.memory_size = UInt64(memory.length)
    region.userspace_addr = memory.start.rawValue
    region.guest_memfd = UInt32(bitPattern: guestMemfd.rawValue)
    region.guest_memfd_offset = UInt64(offset)
    _ = try retryingInterrupted { unsafe clinux_kvm_set_memory2(descriptor.rawValue, &region) }
  }

  /// Takes a slot's memory away from the guest.
  public borrowing func removeMemory(slot: UInt32) throws(Errno) {
    try setMemory(
      slot: slot, at: GuestAddress(0), to: HostRange(start: HostAddress(0), length: 0))
  }
}
