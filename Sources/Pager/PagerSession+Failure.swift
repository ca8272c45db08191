// SPDX-License-Identifier: Apache-2.0

internal import GuestMemory
internal import LinuxSystem
internal import SystemPackage
internal import Userfault

// Pages without right content: the guest is told.
extension PagerSession {
  /// Tells the guest: the page is poisoned where the kernel can, else its waiters wait. In a
  /// session that has ended nobody is there to tell, and what was given up for that is no damage.
  ///
  /// The kernel's answer decides: a page that is there all the same is no failure.
  func fail(
    _ page: Int, _ region: PagedRegion, _ counters: borrowing WorkerCounters,
    expecting expected: PageState, reason: String
  ) -> FaultOutcome {
    guard !hasEnded else {
      giveBack(region, page..<page + 1)
      return .ended
    }
    let range = region.range(of: page)
    let finding: Finding? = withGate {
      guard region.states.load(page) == expected, !wasReleased else {
        return nil
      }
      guard canPoison else {
        region.states.take(.withhold, page)
        return .done
      }
      let finding = Finding(
        memory.poison(range, wakes: false), of: .poison, on: region.pageSize)
      switch finding {
      case .done: region.states.take(.fail, page)
      case .impossible: region.states.take(.withhold, page)
      case .there: region.states.take(.findThere, page)
      case .unregistered: region.states.take(.unmap, page)
      default: break
      }
      return finding
    }
    switch finding {
    case nil, .there, .unregistered:
      // Whoever waits looks again, and finds what there is.
      memory.wake(range)
      return .resolved
    case .changing, .uncached:
      region.states.take(.giveBack, page)
      return .retry
    case .shortage: return expected == .filling ? .deferred : .doubtful
    case .noGuest:
      end(.processGone)
      return .ended
    case .done, .impossible:
      counters.failedPages.add()
      record(
        PageFailure(
          guestAddress: region.guestAddress.advanced(by: page * region.pageSize.bytes),
          hostAddress: range.start, pageSize: region.pageSize,
          isPoisoned: canPoison && finding == .done, reason: reason))
      // Only now: a guest that its error ends must find it reported. Where the policy is to end the
      // guest, that is for the touch to do and not for the damage: whoever waits faults again.
      if canPoison && finding == .done || options.onDamage == .stopVMM { memory.wake(range) }
      return .resolved
    }
  }

  /// A fault on a page that is poisoned: a filled page may have been put over the error, and then
  /// dropped without an event.
  func poisonAgain(_ page: Int, _ region: PagedRegion) -> FaultOutcome {
    let range = region.range(of: page)
    let finding = gate.read { () -> Finding? in
      guard region.states.load(page) == .poisoned else { return nil }
      return Finding(memory.poison(range), of: .poison, on: region.pageSize)
    }
    switch finding {
    case .done: return .resolved
    case .changing: return .retry
    case .shortage: return .doubtful
    case .noGuest:
      end(.processGone)
      return .ended
    // Whoever waits goes on waiting: the kernel cannot be told.
    case .impossible, .uncached: return .resolved
    case nil, .there, .unregistered:
      memory.wake(range)
      return .resolved
    }
  }

  /// A fault on memory that is not the session's: the other side registered what it did not
  /// describe, or put other memory where some was that it unmapped. There is no right content for it.
  ///
  /// - Parameter fault: with the present address.
  func refuse(_ fault: PageFault, _ counters: borrowing WorkerCounters) -> FaultOutcome {
    let (finding, page) = gate.read { poisonUnknown(fault.address) }
    switch finding {
    case .changing: return .retry
    case .unregistered, .there, .shortage:
      // What is not registered any more was moved or unmapped since: whoever waits looks again.
      try? memory.userfaultfd.wake(page)
      return .resolved
    case .noGuest:
      end(.processGone)
      return .ended
    case .done: break
    default: stopGuestIfSo()
    }
    counters.failedPages.add()
    record(
      PageFailure(
        guestAddress: GuestAddress(fault.address.rawValue), hostAddress: page.start,
        pageSize: .size4KiB, isPoisoned: finding == .done,
        reason: "host address \(page.start) lies in no region"))
    return .resolved
  }

  /// Poisons the page at an address of which nothing is known, in the smallest unit that the kernel
  /// takes there.
  private func poisonUnknown(_ address: HostAddress) -> (Finding, HostRange) {
    let smallest = HostRange(
      start: HostAddress(address.rawValue & ~4095), length: PageSize.size4KiB.bytes)
    guard canPoison else { return (.impossible(.notSupported), smallest) }
    for size in PageSize.allCases {
      let start = address.rawValue & ~UInt64(size.bytes - 1)
      let page = HostRange(start: HostAddress(start), length: size.bytes)
      let finding = Finding(memory.userfaultfd.poison(page), of: .poison, on: size)
      // A smaller unit than that of the memory.
      if finding != .impossible(.invalidArgument) { return (finding, page) }
    }
    return (.impossible(.invalidArgument), smallest)
  }

  /// Looks again for the content of pages that had none and were not poisoned
  /// (`DamagePolicy.wait`); whoever waits for them faults anew.
  public func retryFailed() {
    for region in regions {
      var page = 0
      while let failed = region.states.first(.withheld, in: page..<region.pageCount) {
        if region.states.take(.retry, failed) { memory.wake(region.range(of: failed)) }
        page = failed + 1
      }
    }
  }
}
