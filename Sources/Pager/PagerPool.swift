// SPDX-License-Identifier: Apache-2.0

internal import LinuxSystem
internal import Synchronization
internal import SystemPackage
internal import Userfault

/// A few fault threads that serve any number of sessions (`PagerSession.start(in:)`).
///
/// All threads wait on one epoll instance. A session is reported to one of them, which reads and
/// resolves what there is, at most one batch and one piece ahead of the guest, and has the
/// session watched again: whoever was reported first is served first, so none goes ahead of the
/// others (EPOLLONESHOT, epoll(7)). Sessions share no lock on this way, and an idle one costs
/// nothing. No thread waits for a source: see `PageSource.readAtHand`.
public final class PagerPool: Sendable {
  let watch: PoolWatch
  let reporter: Reporter
  let spare: SpareDescriptor
  private let crew: PoolCrew
  /// How long a session that leaves waits for a thread that is stuck.
  let patience: UInt64

  /// Starts the threads, which are named `fault0`, `fault1`, …. One more is kept in reserve, one
  /// watches them (`poolwatch`), and one calls what sessions were given to call (`report`).
  ///
  /// - Parameters:
  ///   - threads: as many as there are processors to spare for faults.
  ///   - capacity: sessions at a time.
  ///   - stuckAfter: how long a turn takes, in nanoseconds, before its thread is taken for stuck.
  ///   - patience: how long `PagerSession.stop`, and `stop`, wait for a thread that is stuck, in
  ///     nanoseconds.
  ///   - onStuck: called when a thread is stuck, as `PagerOptions.onFailure`. Its session has it
  ///     from here on, and another thread is there for the others.
  public init(
    threads count: Int = 2, capacity: Int = 1024, stuckAfter: UInt64 = 250_000_000,
    patience: UInt64 = 5_000_000_000, onStuck: (@Sendable (StuckThread) -> Void)? = nil
  ) throws(PagerError) {
    self.patience = patience
    do {
      watch = try PoolWatch(capacity: max(1, capacity))
      spare = try SpareDescriptor()
      reporter = try Reporter()
    } catch {
      throw PagerError(.resources, "no descriptor or thread for shared fault threads", errno: error)
    }
    let news = Outbox<StuckThread>(limit: 64) {
      onStuck?($0)
    } omitted: { _ in
    }
    news.use(reporter)
    do {
      crew = try PoolCrew(threads: max(1, count), watch, limit: stuckAfter) { news.post($0) }
    } catch {
      reporter.stop()
      throw PagerError(.resources, "no shared thread for serving faults", errno: error)
    }
  }

  deinit { stop() }

  /// Ends the threads; one that is stuck ends by itself when it comes back. Sessions that are still
  /// there serve no more: stop them first.
  public func stop() {
    watch.stop()
    crew.join(patience: patience)
    reporter.stop()
    reporter.join(Self.callbackPatience)
  }

  /// How long `stop` waits for callbacks, in nanoseconds.
  private static var callbackPatience: UInt64 { 1_000_000_000 }

  /// Sessions that are served.
  public var sessionCount: Int { watch.sessionCount }
}

/// What a thread of a pool serves sessions with.
struct PoolTools: ~Copyable {
  var events = EventBuffer(capacity: 32)
  private var bench: Workbench

  init() throws(Errno) { bench = try Workbench(length: 256 << 10, waits: false) }

  /// Makes the bench long enough for the pages of a session; once for each larger page size.
  mutating func reserve(_ length: Int) throws(Errno) {
    if bench.length < length { bench = try Workbench(length: length, waits: false) }
  }

  /// Gives both to a body.
  mutating func use(_ body: (inout EventBuffer, borrowing Workbench) -> Void) {
    body(&events, bench)
  }
}

/// Carries tools to the thread that uses them.
final class ToolsBox: @unchecked Sendable {
  // SAFETY: made by one thread, then used by the one thread of the pool only.
  private var tools: PoolTools
  init(_ tools: consuming PoolTools) { self.tools = tools }
  func run(_ body: (inout PoolTools) -> Void) { body(&tools) }
}
