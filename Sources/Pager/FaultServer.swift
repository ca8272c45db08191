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
  private var doubts = DoubtfulPages()
  private let children: ForkedChildren?
  private var forks = ForkPace()
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
    children = session.children
    queue = FaultQueue(capacity: 512)
  }

  /// Whether faults were read that wait.
  var hasFaults: Bool { queue.count > 0 }
  /// Whether there is something to fill ahead of the guest.
  var hasAhead: Bool { !ahead.pages.isEmpty }
  /// Whether an event waits that cannot be taken yet, and faults behind it; or a fault for which there
  /// is no thread; or a thread keeps the gate. They are tried again a moment later.
  var isHeldUp: Bool { forks.isHeldUp || lacksThread || lacksGate }
  private var lacksThread = false
  private var lacksGate = false

  /// Resolves what was read, until nothing is left, or the turn is over.
  ///
  /// An event that stands before a resolution is read in between. A guest that gives memory back
  /// without an end has always another one: what does not get on is left for the next turn.
  mutating func serve(
    _ events: inout EventBuffer, _ bench: borrowing Workbench, until end: UInt64 = .max
  ) {
    var fruitless = 0
    lacksThread = false
    while !session.isStopping, !lacksThread, let entry = queue.popFirst() {
      switch resolve(entry, bench) {
      case .ended: return
      case .retry:
        slot.counters.retries.add()
        // There is room: it was just taken out.
        queue.append(entry)
        fruitless += 1
        if fruitless > Self.fruitlessLimit {
          guard end == .max else { return }
          Pause.microseconds(50)
        }
        readEvents(&events, patience: end == .max ? .max : Self.gatePatience)
        if isHeldUp { return }
      default: fruitless = 0
      }
      guard end == .max || MonotonicClock.nanoseconds < end else { return }
    }
  }

  /// How long a shared thread waits for the gate: 2 ms. Others have it for one call of the kernel.
  static var gatePatience: UInt64 { 2_000_000 }

  /// Attempts in a row that events stood before, of which each takes 100 µs.
  private static var fruitlessLimit: Int { 4 }

  /// Resolves one fault, or leaves it to the lane.
  private mutating func resolve(
    _ entry: FaultQueue.Entry, _ bench: borrowing Workbench
  ) -> FaultOutcome {
    guard let address = session.memory.original(of: entry.fault.address) else {
      return session.refuse(entry.fault, slot.counters)
    }
    var fault = entry.fault
    fault.address = address
    let window = self.window(for: fault)
    var job = SourceLane<Source>.Job(
      address: address, window: window, received: entry.received)
    let outcome = session.resolve(fault, window: window, bench: bench, counters: slot.counters)
    switch outcome {
    case .resolved:
      slot.counters.serviceTime.record(MonotonicClock.nanoseconds &- entry.received)
    case .deferred:
      guard session.lane.take(job, of: session) else {
        // Who waits faults again, and the session is read again a moment later.
        lacksThread = true
        break
      }
      slot.counters.deferredFaults.add()
    case .doubtful:
      guard doubts.isRepeated(address, at: entry.received) else {
        wake(entry)
        break
      }
      job.isClaimed = false
      if !session.lane.take(job, of: session) { wake(entry) }
      slot.counters.deferredFaults.add()
    case .foreign: return session.refuse(entry.fault, slot.counters)
    case .retry, .ended: break
    }
    return outcome
  }

  /// Has those whose faults wait here fault again.
  mutating func wakeAll() {
    while let entry = queue.popFirst() { wake(entry) }
  }

  /// Has whoever waits for a page look again.
  private func wake(_ entry: FaultQueue.Entry) {
    let size =
      session.memory.original(of: entry.fault.address).flatMap { session.region(at: $0) }?
      .pageSize ?? .size4KiB
    let start = HostAddress(entry.fault.address.rawValue & ~UInt64(size.bytes - 1))
    try? session.memory.userfaultfd.wake(HostRange(start: start, length: size.bytes))
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
  mutating func fillAhead(
    _ events: inout EventBuffer, _ bench: borrowing Workbench, until end: UInt64 = .max
  ) {
    guard hasAhead else { return }
    readEvents(&events, patience: end == .max ? .max : Self.gatePatience)
    guard !isHeldUp else { return }
    guard queue.count == 0 else {
      serve(&events, bench, until: end)
      return
    }
    let reached = session.fillAhead(
      ahead.pages, session.regions[ahead.region], bench, slot.counters)
    ahead.pages = min(reached, ahead.pages.upperBound)..<ahead.pages.upperBound
  }

  /// Reads one batch. Events other than faults take effect before the gate opens, so
  /// whoever resolves a fault that was read later sees them.
  ///
  /// - Parameter patience: how long a thread that holds the gate is waited for, in nanoseconds: it
  ///   may be in the kernel with it for as long as the guest likes. Then nothing is read, and the
  ///   session is held up.
  mutating func readEvents(_ events: inout EventBuffer, patience: UInt64 = .max) {
    // Events go first where faults pile up that wait for them; woken, a thread faults again.
    while queue.room < Self.eventRoom, let oldest = queue.popFirst() { wake(oldest) }
    guard forks.mayRead(children) else { return }
    let session = session
    func read(_ server: inout Self, _ events: inout EventBuffer) -> UInt64 {
      do throws(Errno) {
        try server.forks.read(&events, session.memory.userfaultfd, server.children)
      } catch {
        session.end(.failed(error))
      }
      let now = MonotonicClock.nanoseconds
      while let event = events.pop() { server.take(event, at: now, of: session) }
      return now
    }
    guard patience < .max else {
      received = session.gate.write { read(&self, &events) }
      return
    }
    let now = session.gate.write(patience: patience) { read(&self, &events) }
    lacksGate = now == nil
    received = now ?? MonotonicClock.nanoseconds
  }

  /// The caller holds the gate alone.
  private mutating func take(
    _ event: consuming UserfaultEvent, at now: UInt64, of session: PagerSession<Source>
  ) {
    switch consume event {
    case .pageFault(let fault):
      guard !fault.flags.isProtection else {
        // Nobody would resolve it, and the thread would fault for ever.
        return session.end(.protectionFault)
      }
      if fault.flags.contains(.minor) {
        slot.counters.minorFaults.add()
      } else {
        slot.counters.missingFaults.add()
      }
      queue.append(FaultQueue.Entry(fault: fault, received: now))
    case .remove(let range):
      slot.counters.removeEvents.add()
      session.remove(range)
    case .unmap(let range):
      slot.counters.unmapEvents.add()
      session.unmap(range)
    case .remap(let from, let to, let length):
      slot.counters.remapEvents.add()
      session.move(from: from, to: to, length: length)
    case .fork(let child):
      slot.counters.forkEvents.add()
      session.keep(child)
    default:
      // Not asked for by `PagerSession.features`; another creator's descriptor may
      // send them, and serving on would put content at wrong addresses.
      session.end(.failed(.notSupported))
    }
  }
}
