// SPDX-License-Identifier: Apache-2.0

internal import CGuestProgram
internal import LinuxSystem

/// Runs the guest's program in threads of this process, on the host's view of the memory.
///
/// A vCPU has no registers here: between two batches its whole state is its workload.
final class ProcessMachine: GuestMachine {
  private let memory: HostRange
  private let positions: Monitor<[WorkloadItem?]>

  init(_ memory: HostRange, processors: Int) {
    self.memory = memory
    positions = Monitor(Array(repeating: nil, count: processors))
  }

  func runProcessor(_ index: Int, _ control: GuestControl) throws(GuestError) {
    control.noteExit()
    while true {
      switch control.next(index) {
      case .item(let item): guard try run(item, index, control) else { return }
      case .park: guard control.park(index) else { return }
      case .end, .stop, .proceed: return
      }
    }
  }

  /// Returns `false` when the thread is to end.
  private func run(
    _ item: WorkloadItem, _ index: Int, _ control: GuestControl
  ) throws(GuestError) -> Bool {
    var item = item
    while true {
      var fault = cguest_fault()
      // SAFETY: items are made or checked by WorkloadPlan and GuestState, so the routine
      // stays within the caller's memory; SIGBUS there becomes `fault`.
      let more = unsafe cguest_run_batch(
        GuestLayout.pointer(memory, 0), &item.raw, &fault)
      if fault.happened != 0 {
        throw GuestError.memoryFault(index, memory.guestAddress(of: HostAddress(fault.address)))
      }
      positions.withLock { $0[index] = item }
      if more == 0 { break }
      switch control.afterBatch(index) {
      case .proceed, .item: continue
      case .park: guard control.park(index) else { return false }
      case .end: return false
      case .stop:
        control.finish(index, WorkloadResult(item))
        return true
      }
    }
    control.finish(index, WorkloadResult(item))
    return true
  }

  func kick(_ index: Int) {}

  func saveRegisters(_ index: Int) throws(GuestError) -> [UInt8] { [] }

  func progress(_ index: Int, of item: WorkloadItem) -> WorkloadItem {
    positions.withLock { $0[index] } ?? item
  }

  func attachSamples(_ buffer: HostRange) throws(GuestError) -> UInt64 { buffer.start.rawValue }

  func finish() {}
}

extension HostRange {
  /// Where the guest has a byte of its memory; `nil` outside of it.
  func guestAddress(of address: HostAddress) -> GuestAddress? {
    contains(address) ? GuestAddress(address.rawValue - start.rawValue) : nil
  }
}
