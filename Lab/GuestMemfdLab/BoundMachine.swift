// SPDX-License-Identifier: Apache-2.0

import KVM
import LinuxSystem
import SystemPackage

/// A machine with one vCPU whose data slot, at 2 MiB, is bound to a guest_memfd.
final class BoundMachine {
  static let dataAddress = GuestAddress(2 << 20)
  private static let port: UInt16 = 0x70
  private static let load = 0x8000
  private static let store = 0x8010

  let memory: SharedGuestMemory
  let userfaults: UserfaultBitmap?
  private let code: Mapping
  private let vcpu: VCPU

  init(
    userfaults: UserfaultBitmap?, flags: GuestMemfdFlags = [.mmap, .initShared, .write],
    pageCount: Int = SharedGuestMemory.pageCount
  ) throws {
    // One 2 MiB page of the guest's tables covers the slot.
    let memory = try SharedGuestMemory(flags: flags, pageCount: pageCount)
    let code = try Mapping(anonymous: 2 << 20)
    // Page tables of two 2 MiB pages, then: mov (%rdi), %rax; out %al, %dx; jmp itself; and
    // the same with mov %rax, (%rdi).
    // SAFETY: all offsets lie in the 2 MiB of the mapping.
    unsafe code.pointer.storeBytes(of: 0x2007, toByteOffset: 0x1000, as: UInt64.self)
    unsafe code.pointer.storeBytes(of: 0x3007, toByteOffset: 0x2000, as: UInt64.self)
    unsafe code.pointer.storeBytes(of: 0x0087, toByteOffset: 0x3000, as: UInt64.self)
    unsafe code.pointer.storeBytes(of: 0x20_0087, toByteOffset: 0x3008, as: UInt64.self)
    for (start, opcode) in [(Self.load, 0x8B), (Self.store, 0x89)] {
      for (index, byte) in [0x48, opcode, 0x07, 0xEE, 0xEB, 0xFE].enumerated() {
        unsafe code.pointer.storeBytes(
          of: UInt8(byte), toByteOffset: start + index, as: UInt8.self)
      }
    }
    try memory.machine.setMemory(slot: 0, at: GuestAddress(0), to: code.range)
    try memory.machine.setMemory(
      slot: 1, at: Self.dataAddress, to: memory.mapping.range, guestMemfd: memory.file, offset: 0,
      userfaults: userfaults)
    let system = try KVMSystem()
    let vcpu = try VCPU(memory.machine, identifier: 0)
    try vcpu.setCPUID(try system.supportedCPUID())
    try vcpu.enterLongMode(pageTables: GuestAddress(0x1000), userPrivilege: true)
    self.memory = memory
    self.userfaults = userfaults
    self.code = code
    self.vcpu = vcpu
  }

  static func guestAddress(_ page: Int) -> GuestAddress {
    dataAddress.advanced(by: page * 4096)
  }

  /// Lets the vCPU read the first word of a page, and returns why it came back.
  func read(_ page: Int) throws -> VCPUExit { try start(Self.load, page, 0) }

  /// Lets the vCPU write the first word of a page.
  func write(_ page: Int, _ word: UInt64) throws -> VCPUExit {
    try start(Self.store, page, word)
  }

  /// What the vCPU read or wrote, if the exit says that it did.
  func word(after exit: VCPUExit) throws -> UInt64? {
    guard case .portOutput(Self.port, _, _, _) = exit else { return nil }
    return try vcpu.registers().rax
  }

  private func start(_ code: Int, _ page: Int, _ word: UInt64) throws -> VCPUExit {
    var registers = GeneralRegisters()
    registers.rip = UInt64(code)
    registers.rax = word
    registers.rflags = 0x3002
    registers.rdx = UInt64(Self.port)
    registers.rdi = Self.guestAddress(page).rawValue
    try vcpu.setRegisters(registers)
    return try vcpu.run()
  }

  /// Goes on after an exit; the access is repeated.
  func resume() throws -> VCPUExit { try vcpu.run() }

  /// Fails unless the vCPU has read this word.
  func expect(_ exit: VCPUExit, reads word: UInt64) throws {
    guard let found = try self.word(after: exit) else {
      throw Mismatch(description: "the vCPU stopped with \(exit)")
    }
    try GuestMemfdLab.expect(found, word, "what the vCPU read")
  }
}
