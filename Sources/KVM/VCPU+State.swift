// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import LinuxSystem
public import SystemPackage

extension VCPU {
  /// Everything that the guest needs to go on elsewhere.
  ///
  /// The vCPU is out of `run()` and nothing is pending (`completePendingExit()`).
  /// - Parameters:
  ///   - msrs: which model-specific registers to look at (`KVMSystem.stateMSRs()`); those
  ///     that this vCPU lacks are left out.
  ///   - includingLocalAPIC: `true` when the machine has an interrupt controller in the
  ///     kernel.
  public borrowing func saveState(
    msrs: [UInt32], includingLocalAPIC: Bool = false
  ) throws(Errno) -> VCPUState {
    var components: [VCPUComponent: [UInt8]] = [:]
    for component in VCPUComponent.allCases {
      switch component {
      case .modelSpecific:
        components[component] = try modelSpecificRegisters(msrs).flatMap(\.bytes)
      case .localAPIC where !includingLocalAPIC: continue
      // The extended state contains it.
      case .floatingPoint: continue
      default: components[component] = try bytes(of: component)
      }
    }
    return VCPUState(components: components)
  }

  /// Puts a saved state into a new vCPU.
  ///
  /// Throws what KVM said to the first part that it refused. A model-specific register
  /// that KVM does not let anybody write is not an error when it has the right value.
  public borrowing func restoreState(_ state: VCPUState) throws(Errno) {
    // CPUID decides which other values are valid; LAPIC comes after the system registers,
    // which hold its base; events come last because the others reset them.
    let order: [VCPUComponent] = [
      .cpuid, .tscRate, .runState, .systemRegisters, .registers, .extendedControl,
      .floatingPoint, .extendedState, .debugRegisters, .localAPIC, .modelSpecific, .events,
    ]
    for component in order {
      guard let bytes = state.bytes(of: component) else { continue }
      if component == .modelSpecific {
        try setModelSpecificRegisters(ModelSpecificRegister.parse(bytes))
      } else {
        try set(component, to: bytes)
      }
    }
  }

  // MARK: - Parts

  /// One part as the kernel's structure. Of the model-specific registers there is no list
  /// here: `noData`.
  public borrowing func bytes(of component: VCPUComponent) throws(Errno) -> [UInt8] {
    let number = descriptor.rawValue
    switch component {
    case .registers:
      return try unsafe read(kvm_regs.self) { unsafe clinux_kvm_get_regs(number, $0) }
    case .systemRegisters:
      return try unsafe read(kvm_sregs.self) { unsafe clinux_kvm_get_sregs(number, $0) }
    case .extendedState:
      return try unsafe read(kvm_xsave.self, size: extendedStateSize) {
        extendedStateSize > MemoryLayout<kvm_xsave>.size
          ? unsafe clinux_kvm_get_xsave2(number, $0) : unsafe clinux_kvm_get_xsave(number, $0)
      }
    case .extendedControl:
      return try unsafe read(kvm_xcrs.self) { unsafe clinux_kvm_get_xcrs(number, $0) }
    case .debugRegisters:
      return try unsafe read(kvm_debugregs.self) { unsafe clinux_kvm_get_debugregs(number, $0) }
    case .events:
      return try unsafe read(kvm_vcpu_events.self) { unsafe clinux_kvm_get_vcpu_events(number, $0) }
    case .runState:
      return try unsafe read(kvm_mp_state.self) { unsafe clinux_kvm_get_mp_state(number, $0) }
    case .localAPIC:
      return try unsafe read(kvm_lapic_state.self) { unsafe clinux_kvm_get_lapic(number, $0) }
    case .floatingPoint:
      return try unsafe read(kvm_fpu.self) { unsafe clinux_kvm_get_fpu(number, $0) }
    case .cpuid: return try cpuid().bytes
    case .tscRate:
      let rate = UInt32(clamping: try tscKilohertz())
      return unsafe withUnsafeBytes(of: rate.littleEndian) { unsafe Array($0) }
    case .modelSpecific: throw .noData
    }
  }

  /// Sets one part; the bytes are those of `bytes(of:)`, else `invalidArgument`.
  public borrowing func set(_ component: VCPUComponent, to bytes: [UInt8]) throws(Errno) {
    guard component.accepts(bytes.count) else { throw .invalidArgument }
    let number = descriptor.rawValue
    switch component {
    case .registers:
      try unsafe write(kvm_regs.self, bytes) { unsafe clinux_kvm_set_regs(number, $0) }
    case .systemRegisters:
      try unsafe write(kvm_sregs.self, bytes) { unsafe clinux_kvm_set_sregs(number, $0) }
    case .extendedState:
      // A shorter state than this host's ends in zeros; a longer one does not fit.
      guard bytes.count <= extendedStateSize else { throw .invalidArgument }
      try unsafe write(kvm_xsave.self, bytes, size: extendedStateSize) {
        unsafe clinux_kvm_set_xsave(number, $0)
      }
    case .extendedControl:
      try unsafe write(kvm_xcrs.self, bytes) { unsafe clinux_kvm_set_xcrs(number, $0) }
    case .debugRegisters:
      try unsafe write(kvm_debugregs.self, bytes) { unsafe clinux_kvm_set_debugregs(number, $0) }
    case .events:
      try unsafe write(kvm_vcpu_events.self, bytes) {
        unsafe clinux_kvm_set_vcpu_events(number, $0)
      }
    case .runState:
      try unsafe write(kvm_mp_state.self, bytes) { unsafe clinux_kvm_set_mp_state(number, $0) }
    case .localAPIC:
      try unsafe write(kvm_lapic_state.self, bytes) { unsafe clinux_kvm_set_lapic(number, $0) }
    case .floatingPoint:
      try unsafe write(kvm_fpu.self, bytes) { unsafe clinux_kvm_set_fpu(number, $0) }
    case .cpuid: try setCPUID(CPUIDTable(bytes: bytes))
    case .tscRate:
      let rate = Int(ByteCursor.number(in: bytes, at: 0, size: 4) ?? 0)
      // Asking for the rate that it has is refused by hosts without TSC control.
      if try tscKilohertz() != rate { try setTSCKilohertz(rate) }
    case .modelSpecific: try setModelSpecificRegisters(ModelSpecificRegister.parse(bytes))
    }
  }

  private borrowing func read<Raw>(
    _: Raw.Type, size: Int = MemoryLayout<Raw>.size, _ call: (UnsafeMutablePointer<Raw>) -> Int
  ) throws(Errno) -> [UInt8] {
    let storage = RawStorage(byteCount: max(size, MemoryLayout<Raw>.size))
    _ = try check(unsafe call(storage.bytes.bindMemory(to: Raw.self, capacity: 1)))
    return storage.copy(size)
  }

  private borrowing func write<Raw>(
    _: Raw.Type, _ bytes: [UInt8], size: Int = MemoryLayout<Raw>.size,
    _ call: (UnsafeMutablePointer<Raw>) -> Int
  ) throws(Errno) {
    let storage = RawStorage(byteCount: max(size, MemoryLayout<Raw>.size))
    storage.fill(from: bytes)
    _ = try check(unsafe call(storage.bytes.bindMemory(to: Raw.self, capacity: 1)))
  }
}
