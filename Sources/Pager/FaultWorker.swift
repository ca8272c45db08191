// SPDX-License-Identifier: Apache-2.0

internal import LinuxSystem
internal import SystemPackage
internal import Userfault

/// One fault thread of a session: waits, then has its faults served.
struct FaultWorker<Source: PageSource>: ~Copyable {
  private let session: PagerSession<Source>
  private var waiter: FaultWaiter
  private var server: FaultServer<Source>
  private var events: EventBuffer
  private let bench: Workbench
  /// Nanoseconds of `busyPoll`: at most, and now.
  private let pollLimit: UInt64
  private var pollWindow: UInt64 = 0
  /// Short sleeps until the window opens again, and how many the next failure costs.
  private var pollCooldown = 0
  private var pollPenalty = 1
  /// The process that handed over is gone and the memory is not: when to look for that again.
  private var nextLook: UInt64?

  init(session: PagerSession<Source>, index: Int) throws(Errno) {
    let waiter = try FaultWaiter(session)
    bench = try Workbench(length: session.benchLength, waits: false)
    self.waiter = waiter
    self.session = session
    server = FaultServer(session: session, index: index)
    events = EventBuffer(capacity: FaultServer<Source>.eventRoom)
    pollLimit = session.options.faultThreads == 1 ? session.options.busyPollNanoseconds : 0
  }

  mutating func run() {
    while !session.isStopping {
      if let nextLook, MonotonicClock.nanoseconds >= nextLook { lookForMemory() }
      if server.isHeldUp {
        Pause.microseconds(UInt32(ForkPace.interval / 1000))
        server.readEvents(&events)
        server.serve(&events, bench)
        continue
      }
      if server.hasAhead {
        server.fillAhead(&events, bench)
        continue
      }
      if busyPoll() {
        server.serve(&events, bench)
        continue
      }
      let event: Poller.Event?
      let start = MonotonicClock.nanoseconds
      do throws(Errno) {
        event = try waiter.wait(milliseconds: nextLook == nil ? -1 : 1000)
      } catch {
        session.end(.failed(error))
        return
      }
      switch event.flatMap({ FaultWaiter.Tag(rawValue: $0.tag) }) {
      case nil: continue
      case .stop: return
      case .process:
        waiter.forgetProcess(
          session.memory.userfaultfd.descriptor.rawValue, session.stopSign.descriptor.rawValue)
        lookForMemory()
      case .faults:
        guard event?.isReadable == true || session.makeNonBlocking() else { return }
        server.readEvents(&events)
        if server.received &- start < pollLimit { noteShortSleep() }
        server.serve(&events, bench)
      }
    }
  }

  /// Ends the session when the memory is gone. It may be that of another process than the one that
  /// handed it over, and nothing tells of its end.
  private mutating func lookForMemory() {
    guard session.hasGuestMemory else { return session.end(.processGone) }
    nextLook = MonotonicClock.nanoseconds &+ PoolOrphans.interval
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
      server.readEvents(&events)
      if server.hasFaults {
        pollPenalty = 1
        return true
      }
      if server.received >= deadline { break }
    }
    pollWindow = 0
    pollCooldown = pollPenalty
    pollPenalty = min(1024, pollPenalty * 2)
    return false
  }

  private mutating func noteShortSleep() {
    if pollCooldown > 0 { pollCooldown -= 1 } else { pollWindow = pollLimit }
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
