// SPDX-License-Identifier: Apache-2.0

internal import CGuestProgram

extension WorkloadReport {
  /// Adds up what the vCPUs did.
  init(_ state: GuestControl.State) {
    self.init()
    elapsedNanoseconds = state.finishedAt &- state.startedAt
    wasStopped = state.isStopping
    for processor in state.processors {
      batches += processor.batches
      for result in processor.results { add(result) }
    }
  }

  private mutating func add(_ result: WorkloadResult) {
    pages &+= result.visited
    wrongPages &+= result.wrong
    if result.wrong > 0, let page = Int(exactly: result.firstWrong) {
      firstWrongPage = min(firstWrongPage ?? page, page)
    }
    switch CInt(truncatingIfNeeded: result.command) {
    case CGUEST_COMMAND_COUNTER: counters.append(result.value)
    case CGUEST_COMMAND_DIRTY:
      // The numbers come from the guest: what does not fit is left out.
      guard let first = Int(exactly: result.first), let count = Int(exactly: result.count),
        let written = Int(exactly: result.position), !first.addingReportingOverflow(count).overflow
      else { return }
      dirtied.append(
        DirtyRange(
          pages: first..<first + count, generation: result.generation, written: written))
    default: break
    }
  }
}
