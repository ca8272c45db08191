// SPDX-License-Identifier: Apache-2.0

public import GuestMemory
internal import KVM
internal import KVMDirtyTracking
internal import LinuxSystem
internal import Synchronization
internal import SystemPackage

extension TestGuest {
  /// Why a method cannot track the writes to this guest's memory; `nil` when it can.
  public func unavailability(
    of method: DirtyTrackingMethod, backing: MemoryBacking
  ) -> String? {
    switch method {
    case .writeProtect, .async: return method.userfaultUnavailability(for: backing)
    case .ring, .log: break
    }
    guard let machine = machine.withLock({ $0 }) as? KVMMachine else {
      return "only a guest that runs in KVM has it"
    }
    if machine.binding != nil { return "KVM does not log writes to guest_memfd" }
    let wantsRings = method == .ring
    guard (machine.dirtyRings != nil) == wantsRings else {
      return wantsRings
        ? "this guest was made without dirty rings" : "this guest's dirty rings replace the log"
    }
    return method.kvmUnavailability()
  }

  /// A tracker of the writes to this guest's memory; it does nothing yet.
  ///
  /// The trackers of KVM keep the virtual machine alive, also after `shutdown()`.
  /// - Parameters:
  ///   - method: `nil` takes the first of ring, log, async and write-protect that works
  ///     here; with a hook write-protect, which alone has one.
  ///   - backing: what the guest's memory is made of.
  ///   - hook: see `WriteProtectTracking.WriteHook`.
  /// - Throws: `.unavailable` with the reason.
  public func makeDirtyTracking(
    _ method: DirtyTrackingMethod? = nil, backing: MemoryBacking,
    willWrite hook: WriteProtectTracking.WriteHook? = nil
  ) throws(DirtyTrackingError) -> any DirtyTracking {
    let candidates: [DirtyTrackingMethod] =
      if let method { [method] } else if hook != nil { [.writeProtect] } else {
        [.ring, .log, .async, .writeProtect]
      }
    var reasons: [String] = []
    for candidate in candidates {
      if let reason = unavailability(of: candidate, backing: backing) {
        reasons.append("\(candidate.rawValue): \(reason)")
      } else {
        return try make(candidate, TrackedRegion(host: memory, backing: backing), hook)
      }
    }
    throw DirtyTrackingError(
      .unavailable, "The guest's writes cannot be tracked. " + reasons.joined(separator: "; "))
  }

  private func make(
    _ method: DirtyTrackingMethod, _ region: TrackedRegion, _ hook: WriteProtectTracking.WriteHook?
  ) throws(DirtyTrackingError) -> any DirtyTracking {
    guard hook == nil || method == .writeProtect else {
      throw DirtyTrackingError(
        .invalidArgument, "\(method.rawValue) cannot announce writes; write-protect can")
    }
    switch method {
    case .writeProtect: return try WriteProtectTracking([region], willWrite: hook)
    case .async: return try AsynchronousTracking([region])
    case .ring, .log:
      guard let machine = machine.withLock({ $0 }) as? KVMMachine else {
        throw DirtyTrackingError(.wrongState, "The guest was shut down")
      }
      guard let rings = machine.dirtyRings else { return try DirtyLogTracking(machine) }
      return DirtyRingTracking(machine, rings)
    }
  }
}

extension KVMMachine: DirtyLoggingMachine {
  var trackedPageCount: Int { memory.length / 4096 }

  func trackedSlots() throws(DirtyTrackingError) -> [TrackedSlot] {
    // The guest may not have run yet; now its other slots are wanted anyway.
    noteRunning()
    let outcome = slots.wait { slots -> Result<[TrackedSlot], GuestError>? in
      if let failure = slots.failure { return .failure(failure) }
      if slots.isEnding {
        return .failure(GuestError(.wrongState, "The guest was shut down"))
      }
      return slots.installed == self.memory.length ? .success(slots.list) : nil
    }
    switch outcome {
    case .success(let list): return list
    case .failure(let error): throw DirtyTrackingError(.wrongState, error.description)
    }
  }

  func setLogging(_ isEnabled: Bool, of slot: TrackedSlot) throws(Errno) {
    let start = slot.pages.lowerBound * 4096
    let part = HostRange(
      start: memory.start.advanced(by: start), length: slot.pages.count * 4096)
    try handle.machine.setMemory(
      slot: slot.number, at: GuestAddress(UInt64(start)), to: part,
      flags: isEnabled ? .logDirtyPages : [])
  }

  func withMachine<Value>(
    _ body: (borrowing VirtualMachine) throws(Errno) -> Value
  ) throws(Errno) -> Value {
    try body(handle.machine)
  }
}
