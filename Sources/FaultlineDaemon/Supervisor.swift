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
/// operator says so. A thread of its own watches the connections; each end has a thread for as
/// long as it takes, so that one that is held up by its storage holds up no other.
final class Supervisor: Sendable {
  private let registry: SessionRegistry
  private let poller: Poller
  private let stopSign: EventDescriptor
  private let ends = Monitor(0)
  private let hasNoTime = Atomic<Bool>(false)
  /// Whether a VMM was let go of with pages missing.
  let hasCutShort = Atomic<Bool>(false)
  private let thread = Mutex<JoinedThread?>(nil)
  private let log: Logger
  private static var stopTag: UInt64 { 0 }

  init(_ registry: SessionRegistry, log: Logger) throws(Errno) {
    self.registry = registry
    self.log = log
    poller = try Poller()
    stopSign = try EventDescriptor()
    try poller.add(stopSign.descriptor.rawValue, tag: Self.stopTag)
  }

  /// Starts the thread.
  func start() throws(Errno) {
    let thread = JoinedThread(try NamedThread(name: "supervisor") { [self] in watch() })
    self.thread.withLock { $0 = thread }
  }

  /// Ends it, and waits until the ends that are under way are over.
  func stop() {
    stopSign.signal()
    thread.withLock { $0 }?.join()
    ends.wait { $0 == 0 ? () : nil }
  }

  /// Has a session's connection watched.
  func watch(_ session: GuestSession) throws(Errno) {
    guard let connection = session.connection, let number = UInt64(session.id) else { return }
    try poller.addOnce(connection.socket.descriptor.rawValue, tag: number)
  }

  private func watch() {
    while true {
      guard let event = try? poller.wait() ?? nil else { continue }
      guard event.tag != Self.stopTag else { return }
      guard let session = registry["\(event.tag)"], let connection = session.connection else {
        continue
      }
      if connection.hasClosed() {
        end(session, "its connection was closed")
      } else {
        try? poller.rearm(connection.socket.descriptor.rawValue, tag: event.tag)
      }
    }
  }

  /// Ends a session whose VMM is gone, or serves it no more.
  ///
  /// May be called from a thread of the session.
  func end(_ session: GuestSession, _ reason: String) {
    guard session.enter(.ending) else { return }
    inThread(session) { session in
      session.connection?.push(.ended(reason))
      session.awaitExit()
      // A process that goes on without the connection must not read zeros.
      if !session.letGo() {
        self.waitForProcess(session)
        session.pager.release()
      }
      self.remove(session, reason)
    }
  }

  /// Fills a session and lets it go. Once `hurry` was called, or was before, it is let go of as
  /// it is.
  ///
  /// - Returns: `false` when it is ending, or detaching, already.
  func detach(_ session: GuestSession, _ reason: String) -> Bool {
    guard session.enter(.detaching) else { return false }
    inThread(session) { [self] session in
      var status = HandoverStatus.detached(reason)
      switch session.detach(isOver: { hasNoTime.load(ordering: .acquiring) }) {
      case .stays: return session.stay()
      case .cutShort:
        hasCutShort.store(true, ordering: .releasing)
        status = .ended(reason)
      case .complete: break
      }
      guard session.enter(.ending) else { return }
      session.connection?.push(status)
      self.remove(session, reason)
    }
    return true
  }

  /// There is no more time for filling.
  func hurry() { hasNoTime.store(true, ordering: .releasing) }

  private func inThread(
    _ session: GuestSession, _ body: @escaping @Sendable (GuestSession) -> Void
  ) {
    ends.withLock { $0 += 1 }
    do throws(Errno) {
      _ = try NamedThread(name: "end") {
        body(session)
        self.ends.withLock { $0 -= 1 }
      }
    } catch {
      // As many threads as there can be: the caller does it.
      log.warning("no thread for ending session \(session.id): \(error)")
      body(session)
      ends.withLock { $0 -= 1 }
    }
  }

  private func waitForProcess(_ session: GuestSession) {
    while !session.pager.hasEnded { Pause.milliseconds(100) }
  }

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
