// SPDX-License-Identifier: Apache-2.0

internal import Glibc
internal import LinuxSystem
internal import Logging
internal import Synchronization
internal import SystemPackage

/// Why a client is sent away.
enum Rejection: Sendable {
  /// It has not said all in time.
  case timedOut
  /// Too many wait, and its user has the most of them.
  case crowded
  /// There is no descriptor for it.
  case noDescriptor
  /// No thread has time for it.
  case noThread
  /// The service stops.
  case stopping

  var reason: String {
    switch self {
    case .timedOut: "its message was not complete in time"
    case .crowded: "too many connections of its user wait"
    case .noDescriptor: "the service has too many open files"
    case .noThread: "no thread of the service has time for it"
    case .stopping: "the service stops"
    }
  }
}

/// A client that has not said all yet.
protocol WaitingClient: AnyObject, Sendable {
  /// Of its connection.
  var descriptor: CInt { get }
  /// Its user, or 0 where the kernel does not say.
  var user: UInt32 { get }
  /// Those that came with its message so far.
  var descriptorCount: Int { get }
  /// Takes what is there, once, without waiting; whether a thread can go on with it.
  func collect() -> Bool
  /// Tells it why it is sent away, and that nothing comes any more, without waiting.
  func reject(_ rejection: Rejection)
  /// Closes what is left of it: its connection, and what it sent. Waits for whatever is behind that.
  func close()
}

/// Accepts the connections of one socket, and waits for all that have not said all yet in one
/// thread: a client that says nothing takes a place, and no thread. Places have an end. When they are
/// taken, the user who has most of them loses the oldest one.
final class Reception<Client: WaitingClient>: Sendable {
  /// What there is for each.
  struct Limits: Sendable {
    /// Connections, and descriptors that came with what they have said so far.
    var places = 1024
    /// From the connection to the end of the message.
    var nanoseconds: UInt64 = 5_000_000_000
    /// Those that have said all and wait for a thread.
    var queue = 1024
  }

  /// What a thread did with a client that had said all.
  enum Outcome: Sendable {
    case done
    /// It is to say more.
    case waitsAgain
  }

  private let listener: UnixListener
  /// For messages: the socket's name.
  private let name: String
  private let limits: Limits
  private let workers: Workers
  private let closers: Workers
  private let make: @Sendable (consuming UnixSocket) -> Client?
  private let handle: @Sendable (Client) -> Outcome
  private let poller: Poller
  private let wakeSign: EventDescriptor
  private let isStopping = Atomic<Bool>(false)
  /// Of the thread; there from the start.
  private let spare = Mutex(SpareDescriptor())
  private let jobs = Monitor(0)
  private let returned = Mutex<[(client: Client, deadline: UInt64)]>([])
  private let thread = Mutex<JoinedThread?>(nil)
  private let log: Logger

  /// - Parameters:
  ///   - workers: do `handle`.
  ///   - closers: let go of clients: closing what a client sent can wait for whatever is behind it.
  ///   - make: a client of a connection; `nil` to close it.
  ///   - handle: what to do with one that has said all.
  init(
    _ listener: consuming UnixListener, name: String, limits: Limits, workers: Workers,
    closers: Workers, log: Logger, make: @escaping @Sendable (consuming UnixSocket) -> Client?,
    handle: @escaping @Sendable (Client) -> Outcome
  ) throws(Errno) {
    try listener.descriptor.setNonBlocking(true)
    let poller = try Poller()
    let wakeSign = try EventDescriptor()
    try poller.add(listener.descriptor.rawValue, tag: WaitingRoom<Client>.listenerTag)
    try poller.add(wakeSign.descriptor.rawValue, tag: WaitingRoom<Client>.wakeTag)
    self.listener = listener
    self.poller = poller
    self.wakeSign = wakeSign
    self.name = name
    self.limits = limits
    self.workers = workers
    self.closers = closers
    self.make = make
    self.handle = handle
    self.log = log
  }

  /// The listening socket.
  var descriptor: CInt { listener.descriptor.rawValue }

  /// Starts to accept.
  func start() throws(Errno) {
    let thread = JoinedThread(try NamedThread(name: "accept") { [self] in run() })
    self.thread.withLock { $0 = thread }
  }

  /// Accepts no more, sends away who waits, and waits some time for what is under way.
  ///
  /// - Returns: whether nothing is under way any more.
  @discardableResult
  func stop(milliseconds: UInt64) -> Bool {
    isStopping.store(true, ordering: .releasing)
    wakeSign.signal()
    thread.withLock { $0 }?.join()
    let deadline = MonotonicClock.nanoseconds + milliseconds * 1_000_000
    return jobs.wait(until: deadline) { $0 == 0 ? () : nil } != nil
  }

  // MARK: - The thread

  private func run() {
    var room = WaitingRoom<Client>()
    while !isStopping.load(ordering: .acquiring) {
      let event = try? poller.wait(milliseconds: room.milliseconds)
      while let client = room.takeExpired() { reject(client, .timedOut) }
      takeReturned(&room)
      guard let event else { continue }
      switch event.tag {
      case WaitingRoom<Client>.wakeTag: wakeSign.reset()
      case WaitingRoom<Client>.listenerTag: accept(into: &room)
      default: collect(event.tag, &room)
      }
    }
    for client in room.takeAll() { reject(client, .stopping) }
  }

  private func accept(into room: inout WaitingRoom<Client>) {
    do throws(Errno) {
      guard let client = make(try listener.accept()) else { return }
      admit(client, deadline: MonotonicClock.nanoseconds + limits.nanoseconds, &room)
    } catch .resourceTemporarilyUnavailable {
      // It went away before it was accepted.
    } catch .tooManyOpenFiles {
      spare.withLock { $0.close() }
      if let socket = try? listener.accept(), let client = make(socket) {
        reject(client, .noDescriptor)
      } else {
        Pause.milliseconds(10)
      }
      // Once those that were let go of are closed.
      _ = closers.waitUntilIdle(milliseconds: 100)
      spare.withLock { $0.open() }
    } catch {
      log.error("nobody can be accepted on \(name): \(error)")
      Pause.milliseconds(100)
    }
  }

  /// Gives a client a place, unless it has said all already.
  private func admit(_ client: Client, deadline: UInt64, _ room: inout WaitingRoom<Client>) {
    guard !client.collect() else { return handOver(client, deadline) }
    let tag = room.add(client, deadline: deadline)
    do throws(Errno) {
      try poller.add(client.descriptor, tag: tag)
    } catch {
      room.remove(tag)
      return reject(client, .noDescriptor)
    }
    makeRoom(&room)
  }

  private func collect(_ tag: UInt64, _ room: inout WaitingRoom<Client>) {
    guard let client = room[tag] else { return }
    guard client.collect() else {
      room.update(tag)
      return makeRoom(&room)
    }
    try? poller.remove(client.descriptor)
    let deadline = room.remove(tag)
    handOver(client, deadline ?? 0)
  }

  private func makeRoom(_ room: inout WaitingRoom<Client>) {
    while room.places > limits.places, let client = room.takeOldestOfMost() {
      reject(client, .crowded)
    }
  }

  private func takeReturned(_ room: inout WaitingRoom<Client>) {
    let clients = returned.withLock { returned in
      defer { returned = [] }
      return returned
    }
    for (client, deadline) in clients { admit(client, deadline: deadline, &room) }
  }

  // MARK: - Threads of others

  private func handOver(_ client: Client, _ deadline: UInt64) {
    let isOne = jobs.withLock { jobs in
      guard jobs < limits.queue else { return false }
      jobs += 1
      return true
    }
    guard isOne else { return reject(client, .noThread) }
    let queued = MonotonicClock.nanoseconds
    workers.run { [self] in
      // Whoever waited so long for a thread may have left.
      if MonotonicClock.nanoseconds > queued + limits.nanoseconds {
        reject(client, .noThread)
      } else if handle(client) == .waitsAgain {
        returned.withLock { $0.append((client, deadline)) }
        wakeSign.signal()
      } else {
        closers.run { client.close() }
      }
      jobs.withLock { $0 -= 1 }
    }
  }

  private func reject(_ client: Client, _ rejection: Rejection) {
    // It may be watched yet, and closing it may take long.
    try? poller.remove(client.descriptor)
    log.warning(
      "a connection on \(name) is closed: \(rejection.reason)",
      metadata: ["uid": "\(client.user)"])
    client.reject(rejection)
    closers.run { client.close() }
  }
}

/// A descriptor that is kept, to be closed when one is needed and there is none.
private struct SpareDescriptor: ~Copyable {
  private var descriptor: OwnedDescriptor?

  init() { descriptor = Self.made }

  private static var made: OwnedDescriptor? {
    try? OwnedDescriptor(openingForReading: "/dev/null")
  }

  mutating func close() { descriptor = nil }

  /// Makes one again.
  mutating func open() { descriptor = Self.made }
}
