// SPDX-License-Identifier: Apache-2.0

internal import LinuxSystem
internal import Synchronization

extension TestGuest {
  /// The state of each vCPU of a paused guest, in bytes. With the guest's memory as it is
  /// now, `init(restoring:states:kind:)` makes a guest that goes on in the middle of the
  /// workload.
  ///
  /// The memory must not be resumed upon between saving the states and copying it.
  /// - Throws: `.wrongState` when the guest is not paused or a vCPU has failed.
  public func saveState() throws(GuestError) -> [[UInt8]] {
    let state = control.monitor.withLock { $0 }
    if let failure = state.processors.lazy.compactMap(\.failure).first { throw failure }
    guard state.processors.allSatisfy(\.isParked), let machine = machine.withLock({ $0 }) else {
      throw GuestError(.wrongState, "Only the state of a paused guest can be saved")
    }
    return try state.processors.enumerated().map { index, processor throws(GuestError) in
      var saved = GuestState(
        kind: kind, processor: index, processorCount: vcpuCount, memoryLength: memory.length)
      saved.batches = processor.batches
      saved.running = processor.running.map { machine.progress(index, of: $0) }
      saved.queue = processor.queue
      saved.results = processor.results
      saved.registers = try machine.saveRegisters(index)
      return saved.encode()
    }
  }
}
