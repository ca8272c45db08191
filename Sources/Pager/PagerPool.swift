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
  private let threads = Mutex<[ThreadBox]>([])

  /// Starts the threads, which are named `fault0`, `fault1`, ….
  ///
  /// - Parameters:
  ///   - threads: as many as there are processors to spare for faults.
  ///   - capacity: sessions at a time.
  public init(threads count: Int = 2, capacity: Int = 1024) throws(PagerError) {
    do {
      watch = try PoolWatch(capacity: max(1, capacity))
      spare = try SpareDescriptor()
      reporter = try Reporter()
    } catch {
      throw PagerError(.resources, "no descriptor or thread for shared fault threads", errno: error)
    }
    do throws(Errno) {
      for index in 0..<max(1, count) {
        let box = ToolsBox(try PoolTools())
        keep(
          try NamedThread(name: "fault\(index)") { [watch] in
            box.run { (tools: inout PoolTools) in watch.serve(&tools) }
          })
      }
      keep(try NamedThread(name: "poolwatch") { [watch] in watch.watch() })
    } catch {
      stop()
      throw PagerError(.resources, "no shared thread for serving faults", errno: error)
    }
  }

  deinit { stop() }

  private func keep(_ thread: consuming NamedThread) {
    let joined = ThreadBox(thread)
    threads.withLock { $0.append(joined) }
  }

  /// Ends the threads. Sessions that are still there serve no more: stop them first.
  public func stop() {
    watch.stop()
    let threads = threads.withLock { threads in
      defer { threads = [] }
      return threads
    }
    for thread in threads { thread.join() }
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
private final class ToolsBox: @unchecked Sendable {
  // SAFETY: made by one thread, then used by the one thread of the pool only.
  private var tools: PoolTools
  init(_ tools: consuming PoolTools) { self.tools = tools }
  func run(_ body: (inout PoolTools) -> Void) { body(&tools) }
}
