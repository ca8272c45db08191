// SPDX-License-Identifier: Apache-2.0

internal import GuestMemory
internal import LinuxSystem
internal import SystemPackage
internal import Userfault

/// Faults that were read and wait to be resolved: first in, first out, of fixed size.
@safe
struct FaultQueue: ~Copyable {
  /// A fault and when it was read.
  struct Entry {
    var fault: PageFault
    var received: UInt64
  }

  private let slots: UnsafeMutableBufferPointer<Entry>
  private var head = 0
  private(set) var count = 0

  init(capacity: Int) { unsafe slots = .allocate(capacity: capacity) }
  deinit { unsafe slots.deallocate() }

  var room: Int { unsafe slots.count - count }

  mutating func append(_ entry: Entry) {
    precondition(room > 0)
    unsafe slots[(head + count) % slots.count] = entry
    count += 1
  }

  mutating func popFirst() -> Entry? {
    guard count > 0 else { return nil }
    // SAFETY: slots from head on, `count` of them, were stored by `append`.
    let entry = unsafe slots[head]
    unsafe head = (head + 1) % slots.count
    count -= 1
    return entry
  }
}

/// Memory of one thread into which a source reads, sized for its largest page.
@safe
struct StagingBuffer: ~Copyable {
  private let mapping: Mapping

  init(length: Int) throws(Errno) {
    mapping = try Mapping(anonymous: length)
    // Now, so that no fault of our own lengthens a fault of the guest.
    try? mapping.advise(.populateWrite, offset: 0, length: length)
  }

  var length: Int { mapping.length }
  @unsafe var pointer: UnsafeMutableRawPointer { unsafe mapping.pointer }
}

/// One fault thread: waits, reads events, resolves faults. After `init` it allocates
/// nothing, and it never touches the memory that it serves.
struct FaultWorker<Source: PageSource>: ~Copyable {
  let session: PagerSession<Source>
  private let slot: PagerSession<Source>.WorkerSlot
  private let waiter: FaultWaiter
  private var events: EventBuffer
  private var queue: FaultQueue
  private let staging: StagingBuffer
  private let eventRoom = 32
  /// When the last batch was read.
  private var received: UInt64 = 0
  /// Nanoseconds of `busyPoll`: at most, and now.
  private let pollLimit: UInt64
  private var pollWindow: UInt64 = 0
  /// Short sleeps until the window opens again, and how many the next failure costs.
  private var pollCooldown = 0
  private var pollPenalty = 1
  private var streams = AccessStreams()
  /// What is to be filled ahead of the guest when no fault waits.
  private var ahead: (region: Int, pages: Range<Int>) = (0, 0..<0)

  init(session: PagerSession<Source>, index: Int) throws(Errno) {
    let waiter = try FaultWaiter(session)
    let largest = session.regions.map(\.pageSize.bytes).max() ?? 4096
    staging = try StagingBuffer(
      length: max(largest, PagerSession<Source>.pieceLength))
    self.waiter = waiter
    self.session = session
    slot = session.counters[index]
    events = EventBuffer(capacity: eventRoom)
    queue = FaultQueue(capacity: 512)
    pollLimit = session.options.faultThreads == 1 ? session.options.busyPollNanoseconds : 0
  }

  mutating func run() {
    while !session.isStopping {
      if fillAhead() { continue }
      if busyPoll() {
        serve()
        continue
      }
      let event: Poller.Event?
      let start = MonotonicClock.nanoseconds
      do throws(Errno) {
        event = try waiter.wait()
      } catch {
        session.end(.failed(error))
        return
      }
      switch event.flatMap({ FaultWaiter.Tag(rawValue: $0.tag) }) {
      case nil: continue
      case .stop: return
      case .process:
        session.end(.processGone)
        return
      case .faults:
        guard event?.isReadable == true else {
          // An error and nothing to read: not a userfaultfd that can be served.
          session.end(.failed(.ioError))
          return
        }
        received = readEvents()
        if received &- start < pollLimit { noteShortSleep() }
        serve()
      }
    }
  }

  // MARK: - Waiting

  /// Looks for the next fault without going to sleep, as long as that has paid off: a
  /// guest that faults again within the limit is spared two context switches.
  ///
  /// The window opens when a sleep turned out shorter than the limit, and closes when
  /// looking was in vain: for twice as many short sleeps each time that happens in a row,
  /// because where the guest needs this very processor it cannot fault while we look. An
  /// idle session sleeps. Only for a single thread:
  /// with several, the others would be woken for every fault that this one takes.
  private mutating func busyPoll() -> Bool {
    guard pollWindow > 0 else { return false }
    let deadline = MonotonicClock.nanoseconds &+ pollWindow
    while !session.isStopping {
      received = readEvents()
      if queue.count > 0 {
        pollPenalty = 1
        return true
      }
      if received >= deadline { break }
    }
    pollWindow = 0
    pollCooldown = pollPenalty
    pollPenalty = min(1024, pollPenalty * 2)
    return false
  }

  private mutating func noteShortSleep() {
    if pollCooldown > 0 { pollCooldown -= 1 } else { pollWindow = pollLimit }
  }

  /// Resolves what was read, until nothing is left.
  private mutating func serve() {
    var fruitless = 0
    while let entry = queue.popFirst() {
      let window = window(for: entry.fault)
      switch session.resolve(
        entry.fault, window: window, staging: staging, counters: slot.counters)
      {
      case .resolved:
        slot.counters.serviceTime.record(MonotonicClock.nanoseconds &- entry.received)
        fruitless = 0
      case .retry:
        // An event stands before the resolution: read it, then try again.
        slot.counters.retries.add()
        if queue.room > eventRoom {
          queue.append(entry)
        } else {
          // Room for the event goes first; woken, the thread faults again.
          try? session.userfaultfd.wake(session.page(of: entry.fault))
        }
        fruitless += 1
        if fruitless > 64 { Pause.microseconds(50) } else { Pause.yield() }
        received = readEvents()
      case .ended:
        return
      }
    }
  }

  // MARK: - Ahead of the guest

  /// How many pages from the one of a fault on to bring now. The rest of what the guest will
  /// probably touch next is filled when no fault waits.
  private mutating func window(for fault: PageFault) -> Int {
    let maximum = session.options.faultAround.maximum
    guard maximum > 0, let (number, region) = session.numberedRegion(at: fault.address) else {
      return 1
    }
    let size = region.pageSize.bytes
    let page = region.page(of: fault.address)
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
  private mutating func fillAhead() -> Bool {
    guard !ahead.pages.isEmpty else { return false }
    received = readEvents()
    guard queue.count == 0 else {
      serve()
      return true
    }
    let reached = session.fillAhead(
      ahead.pages, session.regions[ahead.region], staging, slot.counters)
    ahead.pages = min(reached, ahead.pages.upperBound)..<ahead.pages.upperBound
    return true
  }

  /// Reads one batch. Events other than faults take effect before the gate opens, so
  /// whoever resolves a fault that was read later sees them.
  private mutating func readEvents() -> UInt64 {
    session.gate.write {
      do throws(Errno) {
        _ = try events.read(from: session.userfaultfd)
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
        case .fork(let child):
          session.keep(child)
          session.end(.failed(.notSupported))
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

/// Carries a worker from the thread that makes it to the thread that runs it.
final class FaultWorkerBox<Source: PageSource>: @unchecked Sendable {
  // SAFETY: created by one thread, then used by the one fault thread only; starting
  // that thread orders the two.
  private var worker: FaultWorker<Source>

  init(session: PagerSession<Source>, index: Int) throws(Errno) {
    worker = try FaultWorker(session: session, index: index)
  }

  @specialized(where Source == ImageSource)
  func run() { worker.run() }
}
