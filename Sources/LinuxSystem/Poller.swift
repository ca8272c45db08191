// SPDX-License-Identifier: Apache-2.0

internal import CLinux
public import SystemPackage

/// An epoll instance for one thread (epoll(7)). Waiting allocates nothing.
public struct Poller: ~Copyable, Sendable {
  private let descriptor: OwnedDescriptor

  /// A set that watches nothing yet.
  public init() throws(Errno) {
    descriptor = OwnedDescriptor(owning: CInt(try check(clinux_epoll_create())))
  }

  /// What became of the one descriptor that `wait` reports.
  public struct Event: Sendable, Equatable {
    /// The tag that it was added under.
    public let tag: UInt64
    /// `false` when it only has EPOLLERR or EPOLLHUP.
    public let isReadable: Bool

    init(tag: UInt64, isReadable: Bool) {
      self.tag = tag
      self.isReadable = isReadable
    }
  }

  /// Watches a descriptor for being readable, level-triggered.
  ///
  /// - Parameters:
  ///   - tag: comes back with the event.
  ///   - exclusive: when several pollers watch it, wake one of them and not all
  ///     (EPOLLEXCLUSIVE).
  public borrowing func add(_ watched: CInt, tag: UInt64, exclusive: Bool = false) throws(Errno) {
    var events = EPOLLIN.rawValue
    if exclusive { events |= EPOLLEXCLUSIVE.rawValue }
    _ = try check(clinux_epoll_add(descriptor.rawValue, watched, events, tag))
  }

  /// Watches a descriptor for being readable until it is reported once, to one of the threads
  /// that wait; then `rearm` (EPOLLONESHOT).
  public borrowing func addOnce(_ watched: CInt, tag: UInt64) throws(Errno) {
    let events = EPOLLIN.rawValue | EPOLLONESHOT.rawValue
    _ = try check(clinux_epoll_add(descriptor.rawValue, watched, events, tag))
  }

  /// Watches a socket for its peer's end only (EPOLLRDHUP), once.
  public borrowing func addHangup(_ watched: CInt, tag: UInt64) throws(Errno) {
    let events = clinux_epoll_hangup() | EPOLLONESHOT.rawValue
    _ = try check(clinux_epoll_add(descriptor.rawValue, watched, events, tag))
  }

  /// Watches a descriptor of `addOnce` for the next time.
  public borrowing func rearm(_ watched: CInt, tag: UInt64) throws(Errno) {
    let events = EPOLLIN.rawValue | EPOLLONESHOT.rawValue
    _ = try check(clinux_epoll_modify(descriptor.rawValue, watched, events, tag))
  }

  /// Stops watching a descriptor.
  public borrowing func remove(_ watched: CInt) throws(Errno) {
    _ = try check(clinux_epoll_remove(descriptor.rawValue, watched))
  }

  /// Waits for the next event; `nil` when the time ran out or a signal came.
  ///
  /// - Parameter milliseconds: negative waits for ever.
  public borrowing func wait(milliseconds: CInt = -1) throws(Errno) -> Event? {
    var event = unsafe epoll_event()
    let ready = unsafe clinux_epoll_wait(descriptor.rawValue, &event, 1, milliseconds)
    if ready == -Int(EINTR) { return nil }
    guard try check(ready) > 0 else { return nil }
    return unsafe Event(
      tag: event.data.u64, isReadable: event.events & EPOLLIN.rawValue != 0)
  }
}

/// A descriptor that becomes readable when a process ends (pidfd_open(2)).
public func openProcess(_ processID: CInt) throws(Errno) -> OwnedDescriptor {
  OwnedDescriptor(owning: CInt(try check(clinux_pidfd_open(processID))))
}

/// Ends a process at once (SIGKILL, pidfd_send_signal(2)). `noSuchProcess` when it has ended.
public func sendKill(to process: borrowing OwnedDescriptor) throws(Errno) {
  _ = try check(clinux_pidfd_send_signal(process.rawValue, SIGKILL))
}

/// Whether `sendKill` would be permitted (signal 0, kill(2)): `notPermitted` for a process of another
/// user without CAP_KILL.
public func checkKill(of process: borrowing OwnedDescriptor) throws(Errno) {
  _ = try check(clinux_pidfd_send_signal(process.rawValue, 0))
}
