// SPDX-License-Identifier: Apache-2.0

internal import GuestMemory
public import LinuxSystem
internal import Synchronization
internal import SystemPackage
internal import Userfault

/// How a session let go of memory that may still be in use (`PagerSession.letGo`).
public enum LettingGo: Sendable, Hashable {
  /// All of the guest's content is there, or the guest is gone.
  case complete
  /// So many pages have no content: a touch of one is a memory error.
  case missing(pages: Int)
  /// Pages are missing that the kernel cannot make memory errors (before Linux 6.6), or that it did
  /// not take. Nothing was let go of: keep the session until the process has ended.
  case impossible
}

extension PagerSession {
  /// Stops, unregisters all regions and wakes everyone who still waits.
  ///
  /// Absent pages read as zero from here on, so call it when no guest uses the memory
  /// any more, or when `populate` has filled it all without an error. For memory that is in use
  /// there is `letGo`.
  public func release() {
    stop()
    unregister()
  }

  /// Lets go of memory that may still be in use: no page of it turns into zeros that the guest did
  /// not ask for. What is not there yet is made a memory error (UFFDIO_POISON), about 50 ns a
  /// page; fill it before, with `startFill`, until `isFilled`. Then the session is stopped and
  /// released.
  ///
  /// Pages that wait for their source are given up. Clones are detached first (`detachClones`).
  /// Call it while the session serves, or has ended. May take some seconds where threads are stuck
  /// in a source.
  public func letGo() -> LettingGo {
    guard hasGuestMemory else {
      release()
      return .complete
    }
    guard detachClones() else { return .impossible }
    guard canSeal || isFilled && !hasWithheld else { return .impossible }
    // Most of it while faults are served, so that nobody waits for long.
    if canSeal { _ = seal() }
    stop()
    // Nobody serves, and no page is claimed any more but by threads that are stuck. What was given
    // back since is sealed now.
    guard isFilled && !hasWithheld || canSeal && sealUnserved() else {
      // It is served as before: whoever faults would wait for ever.
      if let restart = restart.withLock({ $0 }) { try? restart(self) }
      return .impossible
    }
    let missing = regions.reduce(0) { $0 + $1.states.count(of: .poisoned) }
    unregister()
    return missing == 0 || !hasGuestMemory ? .complete : .missing(pages: missing)
  }

  /// Does nothing any more for memory at some addresses: its process put other memory there, which
  /// another session is about to serve. The kernel asks whether memory is registered, and not with
  /// whose userfaultfd, so both would fill it. Those pages are neither filled nor made errors from
  /// here on.
  ///
  /// - Returns: whether any of the session's memory lay there; `nil` when a thread of the session
  ///   cannot be had out of the kernel, which may fill a page there yet.
  public func forget(_ ranges: [HostRange]) -> Bool? {
    let deadline = MonotonicClock.nanoseconds &+ Self.gatePatience
    while true {
      let found = gate.tryWrite { () -> Bool in
        var found = false
        for range in ranges {
          for original in memory.originals(of: range) {
            forEachRegion(in: original) { region in
              found = true
              region.unmap(original)
            }
          }
        }
        return found
      }
      if let found { return found }
      guard MonotonicClock.nanoseconds < deadline else { return nil }
      Pause.microseconds(200)
    }
  }

  /// Whether each page has its content, or is zero by itself, or was given up, or has no right
  /// content: nothing is absent, and nothing is on its way.
  public var isFilled: Bool {
    regions.allSatisfy { region in
      let pages = 0..<region.pageCount
      return region.states.first(.absent, in: pages) == nil
        && region.states.first(.filling, in: pages) == nil
    }
  }

  private var canSeal: Bool { memory.userfaultfd.features.contains(.poison) }

  /// Whether there are pages without right content that the kernel was not told of.
  var hasWithheld: Bool {
    regions.contains { $0.states.first(.withheld, in: 0..<$0.pageCount) != nil }
  }

  /// Whether there is still an address space that could read wrong pages. A process that handed
  /// over the memory of another one may be gone long before that one is.
  public var hasGuestMemory: Bool { memory.userfaultfd.hasAddressSpace }

  private func unregister() {
    isReleased.store(true, ordering: .releasing)
    // Whoever looked before that is done with the page once the gate was had.
    gate.passThrough(patience: Self.gatePatience)
    // ENOENT, EINVAL: the mapping or its process is gone, and with it the waiters.
    // What is unmapped may be another session's: not every kernel asks whose userfaultfd it is.
    for region in regions {
      var page = 0
      while page < region.pageCount {
        let end = region.states.first(.unmapped, in: page..<region.pageCount) ?? region.pageCount
        if end > page { memory.unregister(region.range(of: page, count: end - page)) }
        page = end
        while page < region.pageCount, region.states.load(page) == .unmapped { page += 1 }
      }
    }
    dropEvents()
  }

  /// Reads what was raised since the threads ended: whoever gave memory back, or moved it,
  /// meanwhile waits until that is read. Memory that is registered still was not described: there is
  /// no content for it.
  private func dropEvents() {
    var events = EventBuffer()
    var quiet = 0
    let slot = counters[0]
    // A guest may go on raising events for as long as it likes.
    let deadline = MonotonicClock.nanoseconds &+ 200_000_000
    // One that was under way when its range was unregistered comes a moment later.
    while quiet < 4, MonotonicClock.nanoseconds < deadline {
      guard let count = try? events.read(from: memory.userfaultfd) else { return }
      while let event = events.pop() {
        switch consume event {
        case .pageFault(let fault): _ = refuse(fault, slot.counters)
        case .fork(let child): for child in lateChild(child) { child.sealWhole() }
        default: break
        }
      }
      quiet = count > 0 ? 0 : quiet + 1
      if count == 0 { Pause.microseconds(250) }
    }
  }
}
