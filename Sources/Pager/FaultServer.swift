// SPDX-License-Identifier: Apache-2.0

internal import GuestMemory
internal import LinuxSystem
internal import Synchronization
internal import SystemPackage
internal import Userfault

/// The faults of one session on their way: reads them, resolves them, and fills ahead of the
/// guest. One thread at a time uses it; after `init` it allocates nothing.
struct FaultServer<Source: PageSource>: ~Copyable, @unchecked Sendable {
  // SAFETY: it has an owner, which is one thread at a time; what it hands out is `Sendable`.
  let session: PagerSession<Source>
  private let slot: PagerSession<Source>.WorkerSlot
  private var queue: FaultQueue
  private var streams = AccessStreams()
  /// What is to be filled ahead of the guest when no fault waits.
  private var ahead: (region: Int, pages: Range<Int>) = (0, 0..<0)
  /// When the last batch was read.
  private(set) var received: UInt64 = 0

  /// Events that are read at a time.
  static var eventRoom: Int { 32 }

  /// - Parameter index: of the thread's counters.
  init(session: PagerSession<Source>, index: Int) {
    self.session = session
    slot = session.counters[index]
    queue = FaultQueue(capacity: 512)
  }

  /// Whether faults were read that wait.
  var hasFaults: Bool { queue.count > 0 }
  /// Whether there is something to fill ahead of the guest.
  var hasAhead: Bool { !ahead.pages.isEmpty }

  /// Resolves what was read, until nothing is left.
  mutating func serve(_ events: inout EventBuffer, _ bench: borrowing Workbench) {
    var fruitless = 0
    while let entry = queue.popFirst() {
      var window = 1
      let outcome: FaultOutcome
      if let address = session.memory.original(of: entry.fault.address) {
        var fault = entry.fault
        fault.address = address
        window = self.window(for: fault)
        outcome = session.resolve(fault, window: window, bench: bench, counters: slot.counters)
      } else {
        outcome = session.refuse(entry.fault, slot.counters)
      }
      switch outcome {
      case .resolved:
        slot.counters.serviceTime.record(MonotonicClock.nanoseconds &- entry.received)
        fruitless = 0
      case .deferred:
        session.lane.take(
          SourceLane<Source>.Job(
            address: session.memory.original(of: entry.fault.address) ?? entry.fault.address,
            window: window, received: entry.received),
          of: session)
        slot.counters.deferredFaults.add()
        fruitless = 0
      case .retry:
        // An event stands before the resolution: read it, then try again.
        slot.counters.retries.add()
        if queue.room > Self.eventRoom {
          queue.append(entry)
        } else {
          // Room for the event goes first; woken, the thread faults again.
          let start = HostAddress(entry.fault.address.rawValue & ~4095)
          try? session.memory.userfaultfd.wake(HostRange(start: start, length: 4096))
        }
        fruitless += 1
        if fruitless > 64 { Pause.microseconds(50) } else { Pause.yield() }
        readEvents(&events)
      case .ended:
        return
      }
    }
  }

  // MARK: - Ahead of the guest

  /// How many pages from the one of a fault on to bring now. The rest of what the guest will
  /// probably touch next is filled when no fault waits.
  private mutating func window(for fault: PageFault) -> Int {
    let maximum = session.faultAroundMaximum
    guard maximum > 0, let (number, region) = session.numberedRegion(at: fault.address) else {
      return 1
    }
    let size = region.pageSize.bytes
    let page = region.page(of: fault.address)
    if session.isReplaying.load(ordering: .relaxed) {
      // The step of the working set that the guest is ahead of.
      let step = max(1, PagerSession<Source>.pieceLength / size)
      let first = page / step * step
      ahead = (number, first..<min(first + step, region.pageCount))
      return 1
    }
    let window = streams.window(
      at: Int(truncatingIfNeeded: fault.address.rawValue) / size,
      limit: max(1, maximum / size), slack: 4 + session.source.readAhead / size)
    if window > 1 {
      // What comes with the fault itself is passed over then.
      ahead = (number, (page + 1..<page + window).clamped(to: 0..<region.pageCount))
    }
    return min(window, max(1, PagerSession<Source>.pieceLength / size))
  }

  /// Fills a piece ahead of the guest, if there is something to fill; faults go first.
  mutating func fillAhead(_ events: inout EventBuffer, _ bench: borrowing Workbench) {
    guard hasAhead else { return }
    readEvents(&events)
    guard queue.count == 0 else {
      serve(&events, bench)
      return
    }
    let reached = session.fillAhead(
      ahead.pages, session.regions[ahead.region], bench, slot.counters)
    ahead.pages = min(reached, ahead.pages.upperBound)..<ahead.pages.upperBound
  }

  /// Reads one batch. Events other than faults take effect before the gate opens, so
  /// whoever resolves a fault that was read later sees them.
  mutating func readEvents(_ events: inout EventBuffer) {
    received = session.gate.write {
      do throws(Errno) {
        _ = try events.read(from: session.memory.userfaultfd)
      } catch {
        session.end(.failed(error))
      }
      let now = MonotonicClock.nanoseconds
      while let event = events.pop() {
        switch consume event {
        case .pageFault(let fault):
          if fault.flags.contains(.minor) {
            slot.counters.minorFaults.add()
          } else {
            slot.counters.missingFaults.add()
          }
          queue.append(FaultQueue.Entry(fault: fault, received: now))
        case .remove(let range):
          slot.counters.removeEvents.add()
          session.mark(range, as: .removed)
        case .unmap(let range):
          slot.counters.unmapEvents.add()
          session.mark(range, as: .unmapped)
        case .remap(let from, let to, let length):
          slot.counters.remapEvents.add()
          session.memory.move(from: from, to: to, length: length, regions: session.regions)
        case .fork(let child):
          slot.counters.forkEvents.add()
          session.keep(child)
        default:
          // Not asked for by `PagerSession.features`; another creator's descriptor may
          // send them, and serving on would put content at wrong addresses.
          session.end(.failed(.notSupported))
        }
      }
      return now
    }
  }
}
