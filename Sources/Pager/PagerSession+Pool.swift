// SPDX-License-Identifier: Apache-2.0

internal import LinuxSystem
internal import Synchronization
internal import SystemPackage
internal import Userfault

/// A session that threads of a pool serve, one at a time.
final class PooledSession<Source: PageSource>: PooledGuest {
  private let session: PagerSession<Source>
  /// The lock is free: `duty` says who has it.
  private let server: Mutex<FaultServer<Source>>
  private let duty = Atomic<UInt8>(0)
  /// Bits of `duty`: a thread has its turn; no other turn comes.
  private static var busy: UInt8 { 1 }
  private static var left: UInt8 { 2 }

  init(_ session: PagerSession<Source>) {
    self.session = session
    server = Mutex(FaultServer(session: session, index: 0))
  }

  var name: String { session.options.name }
  var faultDescriptor: CInt { session.memory.userfaultfd.descriptor.rawValue }
  var processDescriptor: CInt { session.processDescriptor }
  var stopDescriptor: CInt { session.stopSign.descriptor.rawValue }

  @specialized(where Source == ImageSource)
  func turn(_ tools: inout PoolTools, isReadable: Bool) -> PooledTurn {
    let (isMine, current) = duty.compareExchange(
      expected: 0, desired: Self.busy, ordering: .acquiringAndReleasing)
    guard isMine else { return current & Self.left != 0 ? .left : .later }
    defer { duty.bitwiseAnd(~Self.busy, ordering: .acquiringAndReleasing) }
    guard !session.isStopping else { return .left }
    guard isReadable || session.makeNonBlocking() else { return .left }
    do throws(Errno) {
      try tools.reserve(session.benchLength)
    } catch {
      session.end(.failed(error))
      return .left
    }
    var next = PooledTurn.left
    tools.use { events, bench in
      next = server.withLock { $0.turn(&events, bench) }
    }
    return session.isStopping ? .left : next
  }

  var hasMemory: Bool { session.hasGuestMemory }
  func processHasEnded() { session.end(.processGone) }
  func wakeAll() { session.wakeAll() }

  func leave(patience: UInt64) -> Bool {
    duty.bitwiseOr(Self.left, ordering: .acquiringAndReleasing)
    let deadline = MonotonicClock.nanoseconds &+ patience
    while duty.load(ordering: .acquiring) & Self.busy != 0 {
      guard MonotonicClock.nanoseconds < deadline else { return false }
      Pause.microseconds(200)
    }
    return true
  }
}

extension FaultServer {
  /// How long a session has a shared thread at a time, but for the resolution that is under way
  /// then: 1 ms.
  static var turnLength: UInt64 { 1_000_000 }

  /// One batch of events and as many resolutions as the turn has time for, or else one piece ahead
  /// of the guest.
  ///
  /// - Returns: what is to be done with the session after it.
  mutating func turn(_ events: inout EventBuffer, _ bench: borrowing Workbench) -> PooledTurn {
    readEvents(&events, patience: Self.gatePatience)
    let end = received &+ Self.turnLength
    if hasFaults {
      serve(&events, bench, until: end)
    } else if hasAhead {
      fillAhead(&events, bench, until: end)
    }
    guard isHeldUp else { return hasFaults || hasAhead ? .hasMore : .waits }
    // The session is reported again for what there is to read, and not for what was read already.
    wakeAll()
    return .later
  }
}

extension PagerSession {
  /// Has the session served by threads that it shares with others, in place of threads of its
  /// own; `PagerOptions.faultThreads` and `busyPollNanoseconds` do not count then.
  ///
  /// Otherwise as `start`. The pool must not end before the session is stopped, which takes it out of
  /// the pool. Throws `resources` when the pool has no room.
  public func start(in pool: PagerPool) throws(PagerError) {
    restart.withLock {
      $0 = { [weak pool] (session) throws(PagerError) in
        if let pool { try session.start(in: pool) } else { try session.start() }
      }
    }
    try begin(spare: pool.spare) { () throws(PagerError) in
      let guest = PooledSession(self)
      let place = try pool.watch.add(guest)
      let (watch, patience) = (pool.watch, pool.patience)
      return Serving(
        end: { watch.remove(place, guest, patience: patience) }, reporter: pool.reporter,
        ownsReporter: false)
    }
  }
}
