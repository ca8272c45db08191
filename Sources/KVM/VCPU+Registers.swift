// SPDX-License-Identifier: Apache-2.0

internal import CLinux
public import LinuxSystem
public import SystemPackage

/// The general registers of a vCPU.
public struct GeneralRegisters: Hashable, Sendable {
  /// The registers of 8086 descent.
  public var rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp: UInt64
  /// The others.
  public var r8, r9, r10, r11, r12, r13, r14, r15: UInt64
  /// Instruction pointer and flags; bit 1 of the flags is always set.
  public var rip, rflags: UInt64

  /// All zero but the flags' fixed bit.
  public init() { self.init(kvm_regs()) }

  init(_ raw: kvm_regs) {
    (rax, rbx, rcx, rdx) = (raw.rax, raw.rbx, raw.rcx, raw.rdx)
    (rsi, rdi, rsp, rbp) = (raw.rsi, raw.rdi, raw.rsp, raw.rbp)
    (r8, r9, r10, r11) = (raw.r8, raw.r9, raw.r10, raw.r11)
    (r12, r13, r14, r15) = (raw.r12, raw.r13, raw.r14, raw.r15)
    (rip, rflags) = (raw.rip, raw.rflags | 2)
  }

  var raw: kvm_regs {
    kvm_regs(
      rax: rax, rbx: rbx, rcx: rcx, rdx: rdx, rsi: rsi, rdi: rdi, rsp: rsp, rbp: rbp, r8: r8,
      r9: r9, r10: r10, r11: r11, r12: r12, r13: r13, r14: r14, r15: r15, rip: rip,
      rflags: rflags)
  }
}

extension VCPU {
  /// KVM_GET_REGS.
  ///
  /// After an exit for port input or MMIO the instruction pointer is still that of the
  /// instruction, see `completePendingExit()`.
  public borrowing func registers() throws(Errno) -> GeneralRegisters {
    var raw = kvm_regs()
    _ = unsafe try check(clinux_kvm_get_regs(descriptor.rawValue, &raw))
    return GeneralRegisters(raw)
  }

  /// KVM_SET_REGS.
  public borrowing func setRegisters(_ registers: GeneralRegisters) throws(Errno) {
    var raw = registers.raw
    _ = unsafe try check(clinux_kvm_set_regs(descriptor.rawValue, &raw))
  }

  /// KVM_SET_CPUID2. Before the system registers are set: KVM checks them against it.
  public borrowing func setCPUID(_ table: CPUIDTable) throws(Errno) {
    try unsafe table.withKernelTable { raw throws(Errno) in
      unsafe try check(clinux_kvm_set_cpuid(descriptor.rawValue, raw))
    }
  }

  /// KVM_GET_CPUID2.
  public borrowing func cpuid() throws(Errno) -> CPUIDTable {
    try unsafe CPUIDTable.read { table throws(Errno) in
      unsafe try check(clinux_kvm_get_cpuid(descriptor.rawValue, table))
    }
  }

  /// The rate of the guest's time-stamp counter in kHz (KVM_GET_TSC_KHZ).
  public borrowing func tscKilohertz() throws(Errno) -> Int {
    try check(clinux_kvm_get_tsc_khz(descriptor.rawValue, 0))
  }

  /// KVM_SET_TSC_KHZ; hosts without `KVMExtension.tscControl` take only their own rate.
  public borrowing func setTSCKilohertz(_ rate: Int) throws(Errno) {
    _ = try check(clinux_kvm_set_tsc_khz(descriptor.rawValue, UInt(rate)))
  }

  /// Puts the vCPU into 64-bit mode with flat segments, at the privilege level of user
  /// code (3) or of a kernel (0).
  ///
  /// Set CPUID first, and the general registers afterwards. User code that does port
  /// input and output needs IOPL 3 in its flags (0x3000). KVM_PVM emulates level 0 one
  /// instruction at a time (0.7 µs each) unless the guest is made for it; it runs level 3
  /// on the processor.
  /// - Parameter pageTables: the guest-physical address of the PML4.
  public borrowing func enterLongMode(
    pageTables: GuestAddress, userPrivilege: Bool
  ) throws(Errno) {
    var system = kvm_sregs()
    _ = unsafe try check(clinux_kvm_get_sregs(descriptor.rawValue, &system))
    let level: UInt8 = userPrivilege ? 3 : 0
    // Linux's own selectors, the only ones that KVM_PVM runs without emulation.
    var code = kvm_segment()
    code.limit = .max
    code.selector = userPrivilege ? 0x33 : 0x10
    code.type = 11  // execute, read, accessed
    code.present = 1
    code.dpl = level
    code.s = 1
    code.l = 1
    code.g = 1
    var data = code
    data.selector = userPrivilege ? 0x2b : 0x18
    data.type = 3  // read, write, accessed
    data.l = 0
    data.db = 1
    var task = kvm_segment()
    task.limit = 0x67
    task.type = 11  // busy 64-bit TSS, which VMX insists on
    task.present = 1
    system.cs = code
    (system.ds, system.es, system.fs, system.gs, system.ss) = (data, data, data, data, data)
    system.tr = task
    system.cr0 = 0x8005_0033  // PG, AM, WP, NE, ET, MP, PE
    system.cr3 = pageTables.rawValue
    system.cr4 = 0x620  // PAE, OSFXSR, OSXMMEXCPT
    system.efer = 0xd01  // NXE, LMA, LME, SCE
    _ = unsafe try check(clinux_kvm_set_sregs(descriptor.rawValue, &system))
  }
}
