// SPDX-License-Identifier: Apache-2.0

internal import HandoverProtocol
internal import LinuxSystem
internal import Logging
internal import MemoryImage
internal import Pager
internal import Synchronization
internal import SystemPackage
internal import VMMAdapters

/// Ends sessions: when the VMM's process is gone, when its connection was closed, when an
/// operator says so. A thread of its own watches the connections. Ends are short and have threads that
/// were made at the start; what may take long, filling a session before it is let go of, has others, so
/// that one that is held up by its storage holds up no end.
final class Supervisor: Sendable {
  private let registry: SessionRegistry
  private let poller: Poller
  /// Has the thread look at `parked` and `isStopping`.
  private let wakeSign: EventDescriptor
  private let ends: Workers
  private let detaches: Workers
  private let hasNoTime = Atomic<Bool>(false)
  private let isStopping = Atomic<Bool>(false)
  /// Whether a VMM was let go of with pages missing.
  let hasCutShort = Atomic<Bool>(false)
  /// Sessions that cannot let go of memory before its process has ended.
  private let parked = Mutex<[(session: GuestSession, reason: String)]>([])
  private let isAsking = Atomic<Bool>(false)
  private let thread = Mutex<JoinedThread?>(nil)
  private let log: Logger
  private static var wakeTag: UInt64 { 0 }

  init(_ registry: SessionRegistry, log: Logger) throws(Errno) {
    self.registry = registry
    self.log = log
    poller = try Poller()
    wakeSign = try EventDescriptor()
    try poller.add(wakeSign.descriptor.rawValue, tag: Self.wakeTag)
    // A VMM can hold its end up for as long as it likes: no limit, so that it is its own thread only.
    ends = try Workers("end", reserve: 2)
    detaches = try Workers("detach", reserve: 1)
  }

  /// Starts the thread.
  func start() throws(Errno) {
    let thread = JoinedThread(try NamedThread(name: "supervisor") { [self] in watch() })
    self.thread.withLock { $0 = thread }
  }

  /// Ends it, and waits some time for the ends that are under way.
  func stop(milliseconds: UInt64) {
    isStopping.store(true, ordering: .releasing)
    wakeSign.signal()
    ends.stop(milliseconds: milliseconds)
    detaches.stop(milliseconds: milliseconds)
  }

  /// Has a session's connection watched.
  func watch(_ session: GuestSession) throws(Errno) {
    guard let connection = session.connection, let number = UInt64(session.id) else { return }
    try poller.addHangup(connection.socket.descriptor.rawValue, tag: number)
  }

  private func watch() {
    while !isStopping.load(ordering: .acquiring) {
      let isParked = parked.withLock { !$0.isEmpty }
      let event = try? poller.wait(milliseconds: isParked ? 100 : -1)
      endParked()
      guard let event else { continue }
      guard event.tag != Self.wakeTag else {
        wakeSign.reset()
        continue
      }
      guard let session = registry["\(event.tag)"] else { continue }
      end(session, "its connection was closed")
    }
  }

  /// Ends a session whose VMM is gone, or serves it no more.
  ///
  /// May be called from a thread of the session, whatever it has locked.
  func end(_ session: GuestSession, _ reason: String) {
    guard let before = session.enter(.ending) else { return }
    // Who is detaching it finds out, and ends it.
    guard before == .serving else { return }
    ends.run { [self] in
      session.connection?.push(.ended(reason))
      session.awaitExit()
      // A process that goes on without the connection must not read zeros.
      if case .stays = session.letGo() { return park(session, reason) }
      remove(session, reason)
    }
  }

  /// Keeps a session until its process has ended.
  private func park(_ session: GuestSession, _ reason: String) {
    parked.withLock { $0.append((session, reason)) }
    wakeSign.signal()
  }

  /// Ends those whose process has ended. The question after that may take as long as a VMM likes,
  /// so one thread at a time asks, and not this one.
  private func endParked() {
    guard !parked.withLock({ $0.isEmpty }),
      !isAsking.exchange(true, ordering: .acquiringAndReleasing)
    else { return }
    ends.run { [self] in
      for (session, reason) in parked.withLock({ $0 }) where !session.pager.hasGuestMemory {
        parked.withLock { $0.removeAll { $0.session === session } }
        session.pager.release()
        remove(session, reason)
      }
      isAsking.store(false, ordering: .releasing)
    }
  }

  /// Fills a session and lets it go. Once `hurry` was called, or was before, it is let go of as
  /// it is.
  ///
  /// - Returns: `false` when it is ending, or detaching, already.
  func detach(_ session: GuestSession, _ reason: String) -> Bool {
    guard session.enter(.detaching) != nil else { return false }
    detaches.run { [self] in
      // Its VMM may leave before there is a thread for it, or meanwhile.
      let detachment =
        session.currentPhase == .ending
        ? session.letGo()
        : session.detach {
          hasNoTime.load(ordering: .acquiring) || session.currentPhase == .ending
        }
      if case .stays = detachment {
        if session.stay() { return }
        return park(session, Self.left)
      }
      guard session.enter(.ending) != nil else { return remove(session, Self.left) }
      var status = HandoverStatus.detached(reason)
      if case .cutShort = detachment {
        status = .ended(reason)
        hasCutShort.store(true, ordering: .releasing)
        log.warning(
          "session \(session.id) is let go of, and pages of it are memory errors: \(reason)",
          metadata: ["session": "\(session.id)"], source: Logger.lifeCycle)
      }
      session.connection?.push(status)
      remove(session, reason)
    }
    return true
  }

  private static let left = "its VMM left while it was let go of"

  /// There is no more time for filling.
  func hurry() { hasNoTime.store(true, ordering: .releasing) }

  private func remove(_ session: GuestSession, _ reason: String) {
    guard registry.remove(session) else { return }
    let statistics = session.pager.statistics
    log.info(
      "session \(session.id) has ended: \(reason)",
      metadata: [
        "session": "\(session.id)", "faults": "\(statistics.faults)",
        "failed-pages": "\(statistics.failedPages)", "image": "\(session.image.path)",
        "name": session.identity.name.map { "\($0)" },
        "pid": "\(session.identity.peer.processID)", "uid": "\(session.identity.peer.userID)",
      ].compactMapValues { $0 }, source: Logger.lifeCycle)
  }
}

/// A thread that is joined once.
final class JoinedThread: Sendable {
  private let thread: Mutex<NamedThread?>
  init(_ thread: consuming NamedThread) { self.thread = Mutex(thread) }
  func join() {
    let thread = self.thread.withLock { $0.take() }
    if let thread { thread.join() }
  }
}
