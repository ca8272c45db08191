// SPDX-License-Identifier: Apache-2.0

internal import LinuxSystem
internal import Synchronization
internal import SystemPackage
internal import Userfault

/// A session that threads of a pool serve, one at a time.
final class PooledSession<Source: PageSource>: PooledGuest {
  private let session: PagerSession<Source>
  /// `nil` once it has left. The lock is free unless it leaves in a turn.
  private let server: Mutex<FaultServer<Source>?>

  init(_ session: PagerSession<Source>) {
    self.session = session
    server = Mutex(FaultServer(session: session, index: 0))
  }

  var faultDescriptor: CInt { session.memory.userfaultfd.descriptor.rawValue }
  var processDescriptor: CInt { session.processDescriptor }

  @specialized(where Source == ImageSource)
  func turn(_ tools: inout PoolTools, isReadable: Bool) -> PooledTurn {
    server.withLock { server in
      guard server != nil, !session.isStopping else { return .left }
      guard isReadable || session.makeNonBlocking() else { return .left }
      do throws(Errno) {
        try tools.reserve(session.benchLength)
      } catch {
        session.end(.failed(error))
        return .left
      }
      var next = PooledTurn.left
      tools.use { events, bench in
        next = server?.turn(&events, bench) ?? .left
      }
      return session.isStopping ? .left : next
    }
  }

  func processHasEnded() { session.end(.processGone) }

  func leave() { server.withLock { $0 = nil } }
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
    readEvents(&events)
    if hasFaults {
      serve(&events, bench, until: received &+ Self.turnLength)
    } else if hasAhead {
      fillAhead(&events, bench)
    }
    return isHeldUp ? .later : hasFaults || hasAhead ? .hasMore : .waits
  }
}

extension PagerSession {
  /// Has the session served by threads that it shares with others, in place of threads of its
  /// own; `PagerOptions.faultThreads` and `busyPollNanoseconds` do not count then.
  ///
  /// Otherwise as `start`. The pool must not end before the session is stopped, which takes it out of
  /// the pool. Throws `resources` when the pool has no room.
  public func start(in pool: PagerPool) throws(PagerError) {
    try begin(spare: pool.spare) { () throws(PagerError) in
      let guest = PooledSession(self)
      let place = try pool.watch.add(guest)
      let watch = pool.watch
      return Serving(
        end: { watch.remove(place, guest) }, reporter: pool.reporter, ownsReporter: false)
    }
  }
}
