// SPDX-License-Identifier: Apache-2.0

public import DaemonConfiguration
internal import Foundation
internal import Glibc
internal import LinuxSystem
internal import Logging
internal import Pager
internal import Synchronization
internal import SystemPackage

/// The service that serves many guests (`faultline serve`).
public final class Daemon {
  /// How a run ended.
  public enum Ending: Sendable {
    /// All sessions were over, or were filled and let go of.
    case drained
    /// Some were not filled in time, or before the second signal.
    case interrupted
  }

  private let configuration: DaemonConfiguration
  private let logWriter: LogWriter
  private let log: Logger
  private var manager: ServiceManager
  private let registry = SessionRegistry()
  private let threads: DaemonThreads
  private let images: ImageRegistry
  private let caches: ImageCaches
  private let pool: PagerPool
  private let supervisor: Supervisor
  private let control: ControlService
  private var listeners: [VMMListener] = []
  private var controlServer: HTTPServer?
  private var controlPath: SocketPath?
  private var metrics: (server: HTTPServer, address: NetworkAddress)?

  /// What threads get at the end that are held up by something, in milliseconds.
  private static var stopTime: UInt64 { 2000 }
  /// What the log's thread gets at the end for lines that wait, in milliseconds.
  private static var flushTime: UInt64 { 2000 }

  /// Prepares a service; nothing is listened on before `run`.
  ///
  /// Call it before there are other threads: signals are blocked in all that come later.
  public init(_ configuration: DaemonConfiguration, environment: [String: String]) throws {
    Signals.block()
    self.configuration = configuration
    logWriter = try LogWriter(
      LogText(format: configuration.logFormat, hasTime: environment["JOURNAL_STREAM"] == nil))
    log = Logger(configuration, logWriter)
    manager = ServiceManager(environment: environment)
    Limits.raiseOpenFiles()
    pool = try PagerPool(
      threads: configuration.faultThreads, capacity: configuration.maximumSessions,
      onStuck: { [log] stuck in log.warning("\(stuck)", metadata: ["session": "\(stuck.session)"]) }
    )
    threads = try DaemonThreads()
    images = ImageRegistry(threads.opens)
    supervisor = try Supervisor(registry, log: log)
    caches = ImageCaches(limit: configuration.cacheLimit)
    control = ControlService(registry, images, caches, supervisor, logWriter, log: log)
  }

  /// Serves until SIGTERM or SIGINT, then drains. Blocks the calling thread.
  public func run() throws -> Ending {
    defer { closeAll() }
    try checkImages()
    try supervisor.start()
    try openListeners()
    try openServers()
    manager.notify("READY=1\nSTATUS=\(configuration.listen.count) sockets for VMMs")
    log.info("ready: \(description)")
    while !Signals.wait(seconds: manager.interval, log) {
      manager.notify("WATCHDOG=1\nSTATUS=\(registry.count) sessions")
    }
    return drain()
  }

  // MARK: - The start

  /// An image that is the same for all VMs has to be there.
  private func checkImages() throws {
    for socket in configuration.listen {
      guard let path = socket.image.fixedPath else { continue }
      do {
        _ = try images.image(at: path)
      } catch {
        throw DaemonError("the image of \(socket.socket), \(path), cannot be used: \(error)")
      }
    }
  }

  private func openListeners() throws {
    let attachment = Attachment(registry, images, caches, supervisor, pool, log: log)
    let inherited = manager.takeSockets(for: configuration.listen.map(\.socket))
    try checkInherited()
    for socket in configuration.listen {
      let listener = try VMMListener(
        socket, inherited: inherited[socket.socket] ?? -1, threads, attachment, registry, log: log)
      listeners.append(listener)
      try listener.start()
    }
  }

  /// One that nobody takes would have VMMs wait for ever.
  private func checkInherited() throws {
    guard let socket = manager.sockets.first else { return }
    throw DaemonError(
      socket.path == nil
        ? "the inherited descriptor \(socket.descriptor) (\"\(socket.name)\") is no Unix stream "
          + "socket that listens"
        : "the inherited socket \(socket.path ?? "") (\"\(socket.name)\") is none of the "
          + "configuration's: give it that path, or FileDescriptorName= the path's last part")
  }

  private func openServers() throws {
    if let path = configuration.controlSocket { try openControl(path) }
    guard let address = configuration.metricsAddress else { return }
    do throws(Errno) {
      let server = try HTTPServer(
        try HTTPServer.listen(on: address), name: "\(address)", threads, log: log
      ) { [control] in control.plainAnswer($0) }
      try server.start()
      metrics = (server, NetworkAddress(host: address.host, port: try server.port))
    } catch {
      throw DaemonError(
        "the metrics cannot be offered on \(address): \(error). Name another address with "
          + "--metrics, or one of this machine.")
    }
  }

  private func openControl(_ path: String) throws {
    do {
      let socket = try SocketPath(path)
      let listener = try socket.listen(mode: 0o600)
      controlPath = consume socket
      let server = try HTTPServer(
        listener, name: path, threads, log: log
      ) { [control] in control.answer($0) }
      try server.start()
      controlServer = server
    } catch {
      throw DaemonError("the control socket cannot be opened: \(error)")
    }
  }

  private var description: String {
    var parts = configuration.listen.map {
      "\($0.handover.rawValue) on \($0.socket) from \($0.image)"
    }
    if let control = configuration.controlSocket { parts.append("control on \(control)") }
    if let metrics { parts.append("metrics on \(metrics.address)") }
    return parts.joined(separator: ", ")
  }

  // MARK: - The end

  private func drain() -> Ending {
    control.isDraining.store(true, ordering: .releasing)
    manager.notify("STOPPING=1\nSTATUS=draining")
    stopListeners()
    let sessions = registry.all
    let limit = Double(configuration.drainTimeoutMilliseconds) / 1000
    if !sessions.isEmpty {
      log.info(
        "\(sessions.count) sessions are filled, for at most \(limit) s; then they need nobody")
    }
    for session in sessions { _ = supervisor.detach(session, "the daemon stops") }
    var deadline = MonotonicClock.nanoseconds + UInt64(limit * 1e9)
    var isHurried = false
    var nextBeat: UInt64 = 0
    while registry.count > 0 {
      let isOver = MonotonicClock.nanoseconds >= deadline
      if MonotonicClock.nanoseconds >= nextBeat {
        manager.notify("WATCHDOG=1\nSTATUS=draining, \(registry.count) sessions")
        nextBeat = MonotonicClock.nanoseconds + UInt64(manager.interval * 1e9)
      }
      guard Signals.wait(seconds: 0.02, log) || isOver else { continue }
      if isHurried { break }
      // Letting go takes about 50 ns a page; who cannot be let go of is left.
      isHurried = true
      supervisor.hurry()
      deadline = MonotonicClock.nanoseconds + 5_000_000_000
    }
    let isComplete = registry.count == 0 && !supervisor.hasCutShort.load(ordering: .acquiring)
    for session in registry.all {
      log.error(
        "session \(session.id) is left as it is: whoever touches a page that is missing waits",
        metadata: ["session": "\(session.id)", "pid": "\(session.identity.peer.processID)"])
    }
    log.info("the end")
    return isComplete ? .drained : .interrupted
  }

  /// Once: another daemon may have the path from here on.
  private func stopListeners() {
    for listener in listeners { listener.stop(milliseconds: Self.stopTime) }
    listeners = []
  }

  /// Ends in bounded time, whatever holds a thread up.
  private func closeAll() {
    stopListeners()
    controlServer?.stop(milliseconds: Self.stopTime)
    controlPath = nil
    metrics?.server.stop(milliseconds: Self.stopTime)
    if registry.count == 0 {
      supervisor.stop(milliseconds: Self.stopTime)
      let pool = pool
      threads.requests.run { pool.stop() }
    }
    threads.stop()
    logWriter.flush(milliseconds: Self.flushTime)
  }
}

/// The signals of the daemon, taken by one thread.
enum Signals {
  /// Those that end it.
  private static var ends: [CInt] { [SIGTERM, SIGINT] }
  /// Those that would end it without a drain, if nobody took them: a terminal that closes, scripts
  /// that mean another service. There is nothing to read again: `systemctl reload` is not offered.
  private static var others: [CInt] { [SIGHUP, SIGUSR1, SIGUSR2] }

  private static var set: sigset_t {
    var set = sigset_t()
    unsafe sigemptyset(&set)
    for number in ends + others { unsafe sigaddset(&set, number) }
    return set
  }

  /// Blocks them in this thread and all that it starts.
  static func block() {
    var set = set
    unsafe pthread_sigmask(SIG_BLOCK, &set, nil)
    // A reader that is gone, a file that may not grow, and a terminal of others are errors of a write.
    for number in [SIGPIPE, SIGXFSZ, SIGTTOU] { signal(number, SIG_IGN) }
  }

  /// Waits for one that ends the daemon; `false` when none came in time.
  static func wait(seconds: Double, _ log: Logger) -> Bool {
    var set = set
    var time = timespec(
      tv_sec: Int(seconds), tv_nsec: Int((seconds - seconds.rounded(.down)) * 1e9))
    let found = unsafe sigtimedwait(&set, nil, &time)
    guard found > 0, !ends.contains(found) else { return found > 0 }
    let name = [SIGHUP: "SIGHUP", SIGUSR1: "SIGUSR1"][found] ?? "SIGUSR2"
    log.info("\(name) does nothing here; SIGTERM ends the service")
    return false
  }
}
