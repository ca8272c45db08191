// SPDX-License-Identifier: Apache-2.0

internal import CGuestProgram
internal import KVM
internal import KVMDirtyTracking
internal import LinuxSystem
internal import Synchronization
internal import SystemPackage

/// Runs the guest's program in a virtual machine without any devices.
///
/// The guest is in 64-bit mode at privilege level 3 with IOPL 3, which KVM_PVM runs on the
/// processor while it would emulate level 0. Its port input and output is the protocol of
/// guest.S.
final class KVMMachine: GuestMachine {
  /// KVM's cost of a slot grows with its pages (0.5 to 2 ms for each GiB where it shadows
  /// page tables), so the guest starts with a small slot and gets the others, up to each
  /// full GiB, after its first exit.
  private static let firstSlot = 256 << 20
  private static let sampleSlot: UInt32 = 1000

  struct Slots: Sendable {
    /// Bytes of guest memory that have slots.
    var installed = 0
    /// The slots, by their pages.
    var list: [TrackedSlot] = []
    /// The guest runs: from now on installing slots holds nothing up.
    var isRunning = false
    var failure: GuestError?
    var isEnding = false
  }

  let memory: HostRange
  let slots = Monitor(Slots())
  let processors: [KVMProcessor]
  let binding: GuestMemfdBinding?
  let handle: GuestMachineHandle
  /// The vCPUs' dirty rings; `nil` without.
  let dirtyRings: DirtyRings?
  private let stateMSRs: [UInt32]
  private let slotThread = Mutex<JoinableThread?>(nil)
  private let sampleBuffer = Mutex<HostRange?>(nil)

  /// A machine whose vCPUs stand at the program's entry.
  convenience init(
    booting memory: HostRange, processors count: Int, _ handle: GuestMachineHandle,
    _ binding: GuestMemfdBinding?
  ) throws(GuestError) {
    let system = try Self.open()
    let cpuid = try host("Asking KVM for the CPUID of guests") { () throws(Errno) in
      try system.supportedCPUID()
    }
    try self.init(memory, system, count, handle, binding) { vcpu, index throws(Errno) in
      try vcpu.setCPUID(cpuid)
      try vcpu.enterLongMode(
        pageTables: GuestAddress(UInt64(CGUEST_PML4)), userPrivilege: true)
      var registers = GeneralRegisters()
      registers.rip = UInt64(Int(CGUEST_PROGRAM) + cguest_program_entry_offset())
      registers.rflags = 0x3002
      registers.r15 = UInt64(GuestLayout.mailbox(of: index))
      registers.rsp = registers.r15 + UInt64(CGUEST_MAILBOX_SIZE)
      try vcpu.setRegisters(registers)
    }
  }

  /// A machine whose vCPUs go on where they were saved.
  convenience init(
    restoring memory: HostRange, states: [VCPUState], _ handle: GuestMachineHandle,
    _ binding: GuestMemfdBinding?
  ) throws(GuestError) {
    let system = try Self.open()
    try self.init(memory, system, states.count, handle, binding) { vcpu, index throws(Errno) in
      try vcpu.restoreState(states[index])
    }
  }

  private init(
    _ memory: HostRange, _ system: borrowing KVMSystem, _ count: Int,
    _ handle: GuestMachineHandle, _ binding: GuestMemfdBinding?,
    prepare: (borrowing VCPU, Int) throws(Errno) -> Void
  ) throws(GuestError) {
    self.memory = memory
    try host("Installing the signal that interrupts vCPUs") { () throws(Errno) in
      try KickSignal.install()
    }
    stateMSRs = try host("Asking KVM for its list of MSRs") { () throws(Errno) in
      try system.stateMSRs()
    }
    var processors: [KVMProcessor] = []
    for index in 0..<count {
      processors.append(
        try host("Preparing vCPU \(index)") { () throws(Errno) in
          let vcpu = try VCPU(handle.machine, identifier: index)
          try prepare(vcpu, index)
          return KVMProcessor(vcpu)
        })
    }
    let entries = handle.dirtyRingEntries
    dirtyRings =
      entries == 0
      ? nil
      : try host("Mapping the dirty rings of \(count) vCPUs") { () throws(Errno) in
        try DirtyRings(vcpuCount: count, entries: entries) { index throws(Errno) in
          try DirtyRing(of: processors[index].vcpu, entries: entries)
        }
      }
    self.processors = processors
    self.handle = handle
    self.binding = binding
    try installSlot(0, upTo: min(Self.firstSlot, memory.length))
    if memory.length > Self.firstSlot {
      let thread = try JoinableThread(name: "guest-slots") { [self] in installOtherSlots() }
      slotThread.withLock { $0 = thread }
    }
  }

  private static func open() throws(GuestError) -> KVMSystem {
    try host("Opening /dev/kvm") { () throws(Errno) in try KVMSystem() }
  }

  // MARK: - Memory slots

  /// Installs what lies between the slots so far and `end`.
  private func installSlot(_ number: UInt32, upTo end: Int) throws(GuestError) {
    let start = slots.withLock { $0.installed }
    try host("Giving the guest its memory from \(start) to \(end)") { () throws(Errno) in
      let address = GuestAddress(UInt64(start))
      let part = HostRange(start: memory.start.advanced(by: start), length: end - start)
      guard let binding else {
        return try handle.machine.setMemory(slot: number, at: address, to: part)
      }
      try handle.machine.setMemory(
        slot: number, at: address, to: part, guestMemfd: binding.file.descriptor, offset: start,
        userfaults: binding.userfaults, firstBit: start / 4096)
    }
    slots.withLock {
      $0.installed = end
      $0.list.append(TrackedSlot(number: number, pages: start / 4096..<end / 4096))
    }
  }

  private func installOtherSlots() {
    slots.wait { $0.isRunning || $0.isEnding ? () : nil }
    var number: UInt32 = 1
    while !slots.withLock({ $0.isEnding || $0.installed == memory.length }) {
      let end = min(Int(number) * GuestLayout.gibibyte, memory.length)
      do {
        try installSlot(number, upTo: end)
      } catch {
        slots.withLock { $0.failure = error }
        return
      }
      number += 1
    }
  }

  /// The guest has had an exit.
  func noteRunning() { slots.withLock { $0.isRunning = true } }

  /// Waits until an address of guest memory has its slot.
  func waitForSlot(_ address: GuestAddress) throws(GuestError) {
    let failure = slots.wait { slots -> GuestError?? in
      if let failure = slots.failure { return .some(failure) }
      return address.rawValue < UInt64(slots.installed) ? .some(nil) : nil
    }
    if let failure { throw failure }
  }

  // MARK: - GuestMachine

  func kick(_ index: Int) { processors[index].vcpu.kick.send() }

  func saveRegisters(_ index: Int) throws(GuestError) -> [UInt8] {
    try host("Saving the state of vCPU \(index)") { () throws(Errno) in
      try processors[index].vcpu.saveState(msrs: stateMSRs).encode()
    }
  }

  /// The guest itself knows where it is.
  func progress(_ index: Int, of item: WorkloadItem) -> WorkloadItem { item }

  func attachSamples(_ buffer: HostRange) throws(GuestError) -> UInt64 {
    let base = UInt64(CGUEST_SAMPLE_BASE)
    let present = sampleBuffer.withLock { $0 }
    if present == buffer { return base }
    try host("Giving the guest room for samples") { () throws(Errno) in
      if present != nil { try handle.machine.removeMemory(slot: Self.sampleSlot) }
      try handle.machine.setMemory(slot: Self.sampleSlot, at: GuestAddress(base), to: buffer)
    }
    sampleBuffer.withLock { $0 = buffer }
    return base
  }

  func finish() {
    slots.withLock { $0.isEnding = true }
    let thread = slotThread.withLock { $0.take() }
    thread?.join()
  }
}

/// A vCPU behind a shared reference.
final class KVMProcessor: Sendable {
  let vcpu: VCPU
  init(_ vcpu: consuming VCPU) { self.vcpu = vcpu }
}
