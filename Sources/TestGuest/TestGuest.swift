// SPDX-License-Identifier: Apache-2.0

internal import CGuestProgram
internal import KVM
public import LinuxSystem
internal import Synchronization
internal import SystemPackage

/// A tiny guest that fills, verifies, touches and dirties its memory.
///
/// It runs in KVM, or where there is none as threads of this process; both run the same
/// machine code on the same layout, so an image of one can be verified by the other.
/// Guest-physical memory begins at 0. The first MiB holds code, page tables, stacks and
/// counters; the workloads use the rest.
///
/// The memory belongs to the caller, stays mapped until `shutdown()` has returned or the
/// guest is gone, and may be under userfaultfd. Restoring never touches it from the
/// caller's thread; booting writes the first MiB.
///
/// Methods may be called from any thread, but not inside the thread that serves the
/// memory's faults: most of them wait for vCPUs, which may wait for a page.
public final class TestGuest: Sendable {
  /// What runs the guest.
  public enum Kind: Hashable, Sendable, CaseIterable {
    /// KVM.
    case kvm
    /// Threads of this process.
    case process
  }

  /// What runs this guest.
  public let kind: Kind
  /// The memory that it was given.
  public let memory: HostRange
  /// How many vCPUs it has.
  public let vcpuCount: Int
  /// When booting or restoring began: CLOCK_MONOTONIC nanoseconds.
  public let startNanoseconds: UInt64

  let control: GuestControl
  let machine: Mutex<(any GuestMachine)?>
  private let threads: [JoinableThread]
  private let samples = Mutex<SampleBuffer?>(nil)

  /// Whether this process may use KVM.
  public static func kvmIsAvailable() -> Bool { (try? KVMSystem()) != nil }

  // MARK: - Creation

  /// A new guest, idle. Writes the first MiB of its memory.
  ///
  /// - Parameters:
  ///   - memory: mapped and writable; 2 MiB to 64 GiB in steps of 2 MiB.
  ///   - vcpus: 1 to 64.
  ///   - handle: the machine that owns a guest_memfd; only for KVM, for one guest.
  ///   - binding: `nil` lets a KVM guest use the mapping.
  /// - Throws: `.invalidArgument`, `.unavailable` without KVM, `.hostFailure`.
  public convenience init(
    booting memory: HostRange, vcpus: Int = 1, kind: Kind, handle: GuestMachineHandle? = nil,
    binding: GuestMemfdBinding? = nil
  ) throws(GuestError) {
    let start = MonotonicClock.nanoseconds
    try GuestLayout.validate(memory, processors: vcpus)
    GuestLayout.install(in: memory, processors: vcpus)
    let machine: any GuestMachine =
      switch kind {
      case .kvm:
        try KVMMachine(
          booting: memory, processors: vcpus, Self.machine(handle), binding)
      case .process: ProcessMachine(memory, processors: vcpus)
      }
    try self.init(
      memory, kind, machine, Array(repeating: GuestControl.Processor(), count: vcpus), start)
  }

  /// A guest that goes on where it was saved; it runs when this returns.
  ///
  /// If it was saved within a workload, take the report with `wait()`.
  /// - Parameters:
  ///   - memory: as long as the memory of the guest that was saved, with its content or
  ///     registered so that its pages come when they are touched.
  ///   - states: from `saveState()`, of a guest of the same kind.
  ///   - handle: the machine that owns a guest_memfd; only for KVM, for one guest.
  ///   - binding: `nil` lets a KVM guest use the mapping.
  /// - Throws: `.damagedState` for bytes that are no state of such a guest, and what
  ///   `init(booting:vcpus:kind:)` throws.
  public convenience init(
    restoring memory: HostRange, states: [[UInt8]], kind: Kind,
    handle: GuestMachineHandle? = nil, binding: GuestMemfdBinding? = nil
  ) throws(GuestError) {
    let start = MonotonicClock.nanoseconds
    try GuestLayout.validate(memory, processors: states.count)
    var saved: [GuestState] = []
    for (index, bytes) in states.enumerated() {
      let state = try GuestState(decoding: bytes)
      try state.validate(for: memory, kind, processor: index, of: states.count)
      saved.append(state)
    }
    let machine: any GuestMachine
    switch kind {
    case .kvm:
      let registers = try saved.map { state throws(GuestError) in try state.vcpuState() }
      machine = try KVMMachine(
        restoring: memory, states: registers, Self.machine(handle), binding)
    case .process:
      machine = ProcessMachine(memory, processors: states.count)
    }
    try self.init(memory, kind, machine, saved.map { $0.processor(kind) }, start)
  }

  private static func machine(
    _ handle: GuestMachineHandle?
  ) throws(GuestError) -> GuestMachineHandle {
    if let handle { handle } else { try GuestMachineHandle() }
  }

  private init(
    _ memory: HostRange, _ kind: Kind, _ machine: any GuestMachine,
    _ processors: [GuestControl.Processor], _ start: UInt64
  ) throws(GuestError) {
    let control = GuestControl(processors)
    self.memory = memory
    self.kind = kind
    self.control = control
    self.machine = Mutex(machine)
    vcpuCount = processors.count
    startNanoseconds = start
    // A vCPU that was saved while it timed touches goes on storing samples.
    let needed = processors.compactMap { $0.running?.sampleEnd }.max() ?? 0
    if kind == .kvm, needed > 0 {
      let buffer = try SampleBuffer(Int(needed))
      _ = try machine.attachSamples(buffer.mapping.range)
      samples.withLock { $0 = buffer }
    }
    var threads: [JoinableThread] = []
    do throws(GuestError) {
      for index in processors.indices {
        threads.append(
          try JoinableThread(name: "vcpu\(index)") {
            var failure: GuestError?
            do throws(GuestError) {
              try machine.runProcessor(index, control)
            } catch {
              failure = error
            }
            control.end(index, failure)
          })
      }
    } catch {
      control.requestEnd()
      for thread in threads { thread.join() }
      throw error
    }
    self.threads = threads
  }

  deinit { shutdown() }

  /// When the guest first did something only a running guest can do (its first exit):
  /// CLOCK_MONOTONIC nanoseconds; `nil` before that.
  public var firstInstructionNanoseconds: UInt64? { control.monitor.withLock { $0.firstExitAt } }

  /// Waits for the guest's first instruction and returns how long after the beginning of
  /// boot or restore it was, in nanoseconds.
  public func timeToFirstInstruction() throws(GuestError) -> UInt64 {
    let (time, failure) = control.monitor.wait { state -> (UInt64?, GuestError?)? in
      if let time = state.firstExitAt { return (time, nil) }
      guard state.processors.allSatisfy(\.hasEnded) else { return nil }
      return (nil, state.processors.lazy.compactMap(\.failure).first)
    }
    if let failure { throw failure }
    guard let time else {
      throw GuestError(.wrongState, "The guest ended before its first instruction")
    }
    return time - startNanoseconds
  }

  // MARK: - Workloads

  /// Runs a workload on all vCPUs and waits for its end.
  ///
  /// - Throws: `.memoryFault` with the guest's address when a vCPU touched a page that is
  ///   poisoned or cannot be had; `.crashed`; `.wrongState` when another one is running.
  public func run(
    _ workload: Workload, _ options: WorkloadOptions = WorkloadOptions()
  ) throws(GuestError) -> WorkloadReport {
    try start(workload, options)
    return try wait()
  }

  /// Starts a workload; take its report with `wait()`.
  public func start(
    _ workload: Workload, _ options: WorkloadOptions = WorkloadOptions()
  ) throws(GuestError) {
    guard let machine = machine.withLock({ $0 }) else {
      throw GuestError(.wrongState, "The guest was shut down; boot or restore a new one")
    }
    func plan(_ base: UInt64) throws(GuestError) -> WorkloadPlan {
      try WorkloadPlan(
        workload, options, processors: vcpuCount, guestPages: memory.length / 4096,
        sampleBase: base)
    }
    var planned = try plan(0)
    if planned.sampleBytes > 0 {
      // A running workload may be using the buffer that this would replace.
      try control.requireIdle()
      let buffer = try SampleBuffer(planned.sampleBytes)
      planned = try plan(try machine.attachSamples(buffer.mapping.range))
      samples.withLock { $0 = buffer }
    }
    try control.start(planned, interval: options.interval)
  }

  /// Waits for the end of the workload that was started, or that a restored guest was in.
  ///
  /// Without `stop()` it waits for ever on `dirty` and `counter` without limits.
  public func wait() throws(GuestError) -> WorkloadReport {
    let final = try control.wait()
    var report = WorkloadReport(final)
    let results = final.processors.flatMap(\.results)
    if results.contains(where: { $0.command == UInt64(CGUEST_COMMAND_TOUCH) }) {
      let visited = final.processors.map { Int($0.results.first?.visited ?? 0) }
      report.samples = samples.withLock { $0?.take(visited, final.sampleParts) ?? [] }
    }
    return report
  }

  /// Asks the workload to end at the next batch of each vCPU; `wait()` then reports what
  /// it did.
  public func stop() { control.stop() }

  /// Changes the pause between two batches of the workload, in nanoseconds.
  public func setInterval(_ nanoseconds: UInt64) {
    control.monitor.withLock { $0.interval = nanoseconds }
  }

  /// Batches that the vCPUs have done since the workload's start: it goes on as long as
  /// this grows.
  public var batches: UInt64 {
    control.monitor.withLock { $0.processors.reduce(0) { $0 + $1.batches } }
  }

  /// The first failure of a vCPU, such as a memory fault; `wait()` throws it too.
  public var failure: GuestError? {
    control.monitor.withLock { $0.processors.lazy.compactMap(\.failure).first }
  }

  // MARK: - Pausing

  /// Stops all vCPUs, within a workload or not; returns when none runs.
  ///
  /// A KVM guest stops at any instruction, a process guest after its batch. A vCPU that
  /// waits for a page stops when it has it (on KVM_PVM nothing else gets it out): faults
  /// must be served until this returns.
  public func pause() {
    control.requestPause()
    kickAll()
    control.waitUntilParked()
  }

  /// Lets a paused guest go on.
  public func resume() { control.resume() }

  /// Ends the guest; the workload that it was in is lost. Returns when no vCPU runs and
  /// their threads are gone.
  ///
  /// Faults must still be served, or released, until this returns.
  public func shutdown() {
    control.requestEnd()
    kickAll()
    for thread in threads { thread.join() }
    let ended = machine.withLock { $0.take() }
    ended?.finish()
  }

  private func kickAll() {
    guard let machine = machine.withLock({ $0 }) else { return }
    for index in 0..<vcpuCount { machine.kick(index) }
  }
}
