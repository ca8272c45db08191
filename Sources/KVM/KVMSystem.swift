// SPDX-License-Identifier: Apache-2.0

internal import CLinux
public import LinuxSystem
public import SystemPackage

/// /dev/kvm: what the host can do (Documentation/virt/kvm/api.rst, section 4,
/// "system ioctls").
public struct KVMSystem: ~Copyable, Sendable {
  /// The open device.
  public let descriptor: OwnedDescriptor

  /// Opens /dev/kvm.
  ///
  /// Throws what open(2) said (`noSuchFileOrDirectory` without KVM, `permissionDenied`),
  /// or `notSupported` for another API version than 12, the only one since Linux 2.6.22.
  public init() throws(Errno) {
    let opened = unsafe clinux_openat(AT_FDCWD, "/dev/kvm", O_RDWR | O_CLOEXEC, 0)
    let descriptor = OwnedDescriptor(owning: CInt(try check(opened)))
    let version = try check(clinux_kvm_api_version(descriptor.rawValue, 0))
    guard version == Int(KVM_API_VERSION) else { throw .notSupported }
    self.descriptor = descriptor
  }

  /// KVM_CHECK_EXTENSION: 0 is "no"; what else a number means depends on the extension.
  public borrowing func value(of extension: KVMExtension) throws(Errno) -> Int {
    try check(clinux_kvm_check_extension(descriptor.rawValue, `extension`.rawValue))
  }

  /// Everything that `faultline doctor` shows.
  public borrowing func capabilities() throws(Errno) -> KVMCapabilities {
    let ring = max(try value(of: .dirtyRingAcquireRelease), try value(of: .dirtyRing))
    let types = try value(of: .vmTypes)
    return KVMCapabilities(
      guestMemfd: try value(of: .guestMemfd) > 0,
      guestMemfdFlags: GuestMemfdFlags(rawValue: UInt64(try value(of: .guestMemfdFlags))),
      userMemory2: try value(of: .userMemory2) > 0,
      memoryFaultInfo: try value(of: .memoryFaultInfo) > 0,
      dirtyRingEntries: ring / MemoryLayout<kvm_dirty_gfn>.size,
      manualDirtyLogProtect: ManualDirtyLogProtect(
        rawValue: UInt64(try value(of: .manualDirtyLogProtect))),
      maximumVCPUs: try value(of: .maximumVCPUs),
      memorySlots: try value(of: .memorySlots),
      // A kernel that does not know the question has the default type only.
      vmTypes: types == 0 ? 1 : UInt64(types))
  }

  /// The size of a vCPU's `kvm_run` mapping in bytes (KVM_GET_VCPU_MMAP_SIZE).
  borrowing func vcpuMappingSize() throws(Errno) -> Int {
    try check(clinux_kvm_vcpu_mmap_size(descriptor.rawValue, 0))
  }

  /// The CPUID leaves that KVM can show a guest on this host (KVM_GET_SUPPORTED_CPUID).
  public borrowing func supportedCPUID() throws(Errno) -> CPUIDTable {
    try unsafe CPUIDTable.read { table throws(Errno) in
      unsafe try check(clinux_kvm_supported_cpuid(descriptor.rawValue, table))
    }
  }

  /// The model-specific registers that belong to a vCPU's state
  /// (KVM_GET_MSR_INDEX_LIST).
  public borrowing func stateMSRs() throws(Errno) -> [UInt32] {
    var room = 256
    while true {
      let storage = RawStorage(byteCount: 4 + room * 4)
      unsafe storage.bytes.storeBytes(of: UInt32(room), as: UInt32.self)
      let list = unsafe storage.bytes.bindMemory(to: kvm_msr_list.self, capacity: 1)
      let result = unsafe clinux_kvm_msr_index_list(descriptor.rawValue, list)
      let count = unsafe Int(storage.bytes.load(as: UInt32.self))
      if result == -Int(E2BIG), count > room {
        room = count
        continue
      }
      _ = try check(result)
      return (0..<count).map { index in
        unsafe storage.bytes.load(fromByteOffset: 4 + index * 4, as: UInt32.self)
      }
    }
  }
}
