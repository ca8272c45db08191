// SPDX-License-Identifier: Apache-2.0

import KVM
import LinuxSystem
import SystemPackage

/// A machine with one vCPU at privilege level 3 and two slots: code and page tables at 0,
/// data at 2 MiB. Memory is identity-mapped in 2 MiB pages.
final class TinyMachine: Sendable {
  static let dataAddress = GuestAddress(2 << 20)
  static let dataPages = 512

  let code: Mapping
  let data: Mapping
  let machine: VirtualMachine
  let vcpu: VCPU
  let stateMSRs: [UInt32]

  /// - Parameter prepare: what is done before the vCPU is made.
  init(
    program: [UInt8], dataFlags: VirtualMachine.SlotFlags = [],
    prepare: (borrowing VirtualMachine) throws(Errno) -> Void = { _ in }
  ) throws {
    let system = try KVMSystem()
    let code = try Mapping(anonymous: 2 << 20)
    let data = try Mapping(anonymous: Self.dataPages * 4096)
    // SAFETY: all offsets lie in the 2 MiB of the mapping.
    unsafe code.pointer.storeBytes(of: 0x2007, toByteOffset: 0x1000, as: UInt64.self)
    unsafe code.pointer.storeBytes(of: 0x3007, toByteOffset: 0x2000, as: UInt64.self)
    unsafe code.pointer.storeBytes(of: 0x0087, toByteOffset: 0x3000, as: UInt64.self)
    unsafe code.pointer.storeBytes(of: 0x20_0087, toByteOffset: 0x3008, as: UInt64.self)
    for (index, byte) in program.enumerated() {
      unsafe code.pointer.storeBytes(of: byte, toByteOffset: 0x8000 + index, as: UInt8.self)
    }
    let machine = try VirtualMachine(system)
    try machine.setMemory(slot: 0, at: GuestAddress(0), to: code.range)
    try machine.setMemory(slot: 1, at: Self.dataAddress, to: data.range, flags: dataFlags)
    try prepare(machine)
    let vcpu = try VCPU(machine, identifier: 0)
    try vcpu.setCPUID(try system.supportedCPUID())
    try vcpu.enterLongMode(pageTables: GuestAddress(0x1000), userPrivilege: true)
    stateMSRs = try system.stateMSRs()
    self.code = code
    self.data = data
    self.machine = machine
    self.vcpu = vcpu
    try start { _ in }
  }

  /// Puts the vCPU at the program's beginning.
  func start(_ change: (inout GeneralRegisters) -> Void) throws {
    var registers = GeneralRegisters()
    registers.rip = 0x8000
    registers.rflags = 0x3002
    registers.rdx = UInt64(Programs.port)
    change(&registers)
    try vcpu.setRegisters(registers)
  }

  /// Writes 8 bytes to each of some data pages, and runs until the program says so.
  func write(pages: Range<Int>, stride: Int = 1) throws -> VCPUExit {
    try start { registers in
      registers.rdi = Self.dataAddress.rawValue + UInt64(pages.lowerBound) * 4096
      registers.rsi = UInt64(stride) * 4096
      registers.rcx = UInt64(pages.count)
      registers.rax = 0x1234_5678
    }
    return try vcpu.run()
  }
}

/// Machine code.
enum Programs {
  static let port: UInt16 = 0x70
  /// jmp itself
  static let spin: [UInt8] = [0xEB, 0xFE]
  /// out %al, %dx; jmp back
  static let output: [UInt8] = [0xEE, 0xEB, 0xFD]
  /// in %dx, %eax; mov %eax, %ebx; out %eax, %dx; jmp back
  static let echo: [UInt8] = [0xED, 0x89, 0xC3, 0xEF, 0xEB, 0xFA]
  /// again: mov %rax, (%rdi); add %rsi, %rdi; dec %rcx; jnz again; out %al, %dx; jmp itself
  static let write: [UInt8] = [
    0x48, 0x89, 0x07, 0x48, 0x01, 0xF7, 0x48, 0xFF, 0xC9, 0x75, 0xF5, 0xEE, 0xEB, 0xFE,
  ]
  /// ud2
  static let undefined: [UInt8] = [0x0F, 0x0B]
}
