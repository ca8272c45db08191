// SPDX-License-Identifier: Apache-2.0

internal import CGuestProgram
internal import KVM
internal import KVMDirtyTracking
internal import LinuxSystem
internal import SystemPackage

extension KVMMachine {
  func runProcessor(_ index: Int, _ control: GuestControl) throws(GuestError) {
    cguest_watch_vcpu_thread()
    let processor = processors[index]
    processor.vcpu.kick.attach()
    defer { processor.vcpu.kick.detach() }
    var isFirst = true
    while true {
      let exit = try run(index)
      if isFirst {
        // A kick says nothing about the guest; every other exit is the guest's doing.
        isFirst = exit == .interrupted
        if !isFirst {
          control.noteExit()
          noteRunning()
        }
      }
      guard try handle(exit, index, control) else { return }
    }
  }

  private func run(_ index: Int) throws(GuestError) -> VCPUExit {
    try host("Running vCPU \(index)") { () throws(Errno) in try processors[index].vcpu.run() }
  }

  /// Returns `false` when the thread is to end.
  private func handle(
    _ exit: VCPUExit, _ index: Int, _ control: GuestControl
  ) throws(GuestError) -> Bool {
    let processor = processors[index]
    switch exit {
    case .portInput(UInt16(CGUEST_PORT_WORKLOAD), _, _):
      switch control.next(index) {
      case .item(let item): processor.vcpu.answer(bytes: item.bytes)
      case .park:
        // Idle: the guest asks again when it goes on.
        processor.vcpu.answer(bytes: [])
        return try completeAndPark(index, control)
      case .end, .stop, .proceed: return false
      }
    case .portInput(UInt16(CGUEST_PORT_CONTINUE), _, _):
      switch control.afterBatch(index) {
      case .proceed, .item: processor.vcpu.answer(1)
      case .stop: processor.vcpu.answer(0)
      case .park:
        processor.vcpu.answer(1)
        return try completeAndPark(index, control)
      case .end: return false
      }
    case .portOutput(UInt16(CGUEST_PORT_RESULTS), _, _, let command):
      let registers = try host("Reading the registers of vCPU \(index)") { () throws(Errno) in
        try processor.vcpu.registers()
      }
      control.finish(index, WorkloadResult(command: command, registers))
    case .interrupted:
      processor.vcpu.kick.acknowledge()
      let fault = cguest_take_vcpu_fault()
      if fault.happened != 0 {
        throw .memoryFault(index, memory.guestAddress(of: HostAddress(fault.address)))
      }
      switch control.request() {
      case .park: return control.park(index)
      case .end: return false
      case .proceed, .stop, .item: break
      }
    case .mmioRead(let address, let size): try read(address, size, index)
    case .mmioWrite(let address, let size, let value): try write(value, address, size, index)
    case .memoryFault(let address, _, .userfault) where provide(address, index): break
    case .dirtyRingFull: try drainRings(index)
    default: throw failure(exit, index)
    }
    return true
  }

  /// Brings the vCPU to where its registers are consistent (it may still have accesses to
  /// make) and stands still.
  private func completeAndPark(_ index: Int, _ control: GuestControl) throws(GuestError) -> Bool {
    while true {
      let exit = try host("Completing the exit of vCPU \(index)") { () throws(Errno) in
        try processors[index].vcpu.completePendingExit()
      }
      switch exit {
      case .interrupted: return control.park(index)
      case .mmioRead(let address, let size): try read(address, size, index)
      case .mmioWrite(let address, let size, let value): try write(value, address, size, index)
      case .memoryFault(let address, _, .userfault) where provide(address, index): break
      case .dirtyRingFull: try drainRings(index)
      default: throw failure(exit, index)
      }
    }
  }

  /// The vCPU cannot go on before its dirty ring has room.
  private func drainRings(_ index: Int) throws(GuestError) {
    try host("Draining the dirty ring of vCPU \(index)") { () throws(Errno) in
      try dirtyRings?.drain(handle.machine)
    }
  }

  /// Has a page provided that the vCPU may not have yet; `false` when there is none.
  private func provide(_ address: GuestAddress, _ index: Int) -> Bool {
    binding?.provide(index, address) ?? false
  }

  // MARK: - Memory without a slot

  // KVM hands accesses to us while their slot is being installed, and on some hosts when
  // it could not get the page. Both are done here, through the host's mapping, by the
  // vCPU's own thread: a page that is really bad raises SIGBUS then.

  private func read(_ address: GuestAddress, _ size: Int, _ index: Int) throws(GuestError) {
    try checkMemory(address, size, index)
    var value: UInt64 = 0
    // SAFETY: the range was checked to lie in guest memory; the copy is guarded.
    let isRead = unsafe withUnsafeMutableBytes(of: &value) { bytes in
      unsafe GuardedMemory.read(
        GuestLayout.pointer(memory, Int(address.rawValue)),
        into: UnsafeMutableRawBufferPointer(rebasing: bytes.prefix(size)))
    }
    guard isRead else { throw .memoryFault(index, address) }
    processors[index].vcpu.answer(value)
  }

  private func write(
    _ value: UInt64, _ address: GuestAddress, _ size: Int, _ index: Int
  ) throws(GuestError) {
    try checkMemory(address, size, index)
    // SAFETY: the range was checked to lie in guest memory; the copy is guarded.
    let isWritten = unsafe withUnsafeBytes(of: value) { bytes in
      unsafe GuardedMemory.write(
        UnsafeRawBufferPointer(rebasing: bytes.prefix(size)),
        to: GuestLayout.pointer(memory, Int(address.rawValue)))
    }
    guard isWritten else { throw .memoryFault(index, address) }
  }

  private func checkMemory(
    _ address: GuestAddress, _ size: Int, _ index: Int
  ) throws(GuestError) {
    guard address.rawValue <= UInt64(memory.length - size) else {
      throw GuestError(
        .crashed, "vCPU \(index) accessed \(address), where this guest has no memory",
        guestAddress: address)
    }
    try waitForSlot(address)
  }

  // MARK: - The guest's end

  private func failure(_ exit: VCPUExit, _ index: Int) -> GuestError {
    switch exit {
    case .memoryFault(let address, _, _): return .memoryFault(index, address)
    case .faultedMemory: return .memoryFault(index, nil)
    default: break
    }
    let place = (try? processors[index].vcpu.registers()).map { registers in
      " at instruction 0x\(String(registers.rip, radix: 16)) "
        + "(program offset \(Int64(bitPattern: registers.rip) - Int64(CGUEST_PROGRAM)))"
    }
    let what = exit == .shutdown ? "ended in a triple fault" : "stopped with \(exit)"
    return GuestError(
      .crashed,
      "vCPU \(index) \(what)\(place ?? ""). Its code, page tables or registers are damaged; "
        + "the first MiB of guest memory holds them.")
  }
}

extension WorkloadResult {
  /// The results as guest.S leaves them in the registers.
  init(command: UInt32, _ registers: GeneralRegisters) {
    self.init(words: [
      UInt64(command), registers.rbx, registers.rcx, registers.rbp, registers.r8, registers.r9,
      registers.r10, registers.r11, registers.r12,
    ])
  }
}
