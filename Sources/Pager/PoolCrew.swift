// SPDX-License-Identifier: Apache-2.0

internal import LinuxSystem
internal import Synchronization
internal import SystemPackage

/// The threads of a pool, one that is kept in reserve, and the one that watches them (`poolwatch`).
///
/// A guest can keep a thread that serves it in the kernel for as long as it likes: by a lock of
/// its address space, or of the file that is its memory. So a thread that does not come back from a
/// turn is left to its session, and the one in reserve serves the others in its place.
final class PoolCrew: Sendable {
  private final class Member: Sendable {
    let worker = PoolWorker()
    private enum Duty { case waits, serves, ends }
    private let duty = Monitor(Duty.waits)
    private let hasEnded = Atomic<Bool>(false)
    var isOver: Bool { hasEnded.load(ordering: .acquiring) }
    private let thread = Mutex<ThreadBox?>(nil)

    /// Starts its thread, which waits for `serve`.
    init(_ name: String, _ body: @escaping @Sendable (PoolWorker) -> Void) throws(Errno) {
      let started = ThreadBox(
        try NamedThread(name: name) { [self] in
          worker.adopt()
          let serves = duty.wait { duty -> Bool? in duty == .waits ? nil : duty == .serves }
          if serves { body(worker) }
          hasEnded.store(true, ordering: .releasing)
        })
      thread.withLock { $0 = started }
    }

    func serve() { duty.withLock { if $0 == .waits { $0 = .serves } } }

    /// Waits for its end; not for a thread that is stuck for longer than that.
    func join(until deadline: UInt64) {
      duty.withLock { if $0 == .waits { $0 = .ends } }
      while !hasEnded.load(ordering: .acquiring) {
        guard MonotonicClock.nanoseconds < deadline else { return }
        Pause.microseconds(500)
      }
      thread.withLock { $0.take() }?.join()
    }
  }

  private struct State {
    /// Also those that sessions have, until they end.
    var members: [Member] = []
    var reserve: Member?
    /// Asks sessions whose process is gone; `nil` while there is no thread for it.
    var checker: Member?
    var count = 0
  }

  private let watch: PoolWatch
  /// How long a turn takes before its thread is taken for stuck, in nanoseconds.
  private let limit: UInt64
  private let tell: @Sendable (StuckThread) -> Void
  private let state = Mutex(State())
  private let watcher = Mutex<ThreadBox?>(nil)

  /// Starts the threads.
  init(
    threads: Int, _ watch: PoolWatch, limit: UInt64, tell: @escaping @Sendable (StuckThread) -> Void
  ) throws(Errno) {
    self.watch = watch
    self.limit = limit
    self.tell = tell
    do throws(Errno) {
      for _ in 0..<threads { try hire()?.serve() }
      try hire(forReserve: true)
      try hireChecker()
      let interval = max(limit / 5, 1_000_000)
      let started = ThreadBox(
        try NamedThread(name: "poolwatch") { [self] in
          watch.keepTime(every: interval) { look() }
        })
      watcher.withLock { $0 = started }
    } catch {
      watch.stop()
      join(patience: 1_000_000_000)
      throw error
    }
  }

  /// Waits for the threads after `PoolWatch.stop`; those that are stuck stay behind.
  func join(patience: UInt64) {
    let deadline = MonotonicClock.nanoseconds &+ patience
    watcher.withLock { $0.take() }?.join()
    let members = state.withLock { state in
      defer { (state.members, state.reserve) = ([], nil) }
      return state.members + (state.reserve.map { [$0] } ?? [])
    }
    for member in members { member.join(until: deadline) }
  }

  @discardableResult
  private func hire(forReserve: Bool = false) throws(Errno) -> Member? {
    let number = state.withLock { state in
      defer { state.count += 1 }
      return state.count
    }
    let box = ToolsBox(try PoolTools())
    let member = try Member("fault\(number)") { [watch] worker in
      worker.reserve(watch.capacity)
      box.run { (tools: inout PoolTools) in watch.serve(worker, &tools) }
    }
    state.withLock { if forReserve { $0.reserve = member } else { $0.members.append(member) } }
    return member
  }

  private func hireChecker() throws(Errno) {
    let checker = try Member("poolcheck") { [watch] worker in watch.check(worker) }
    state.withLock { state in
      state.checker = checker
      state.members.append(checker)
    }
    checker.serve()
  }

  // MARK: - The watch

  /// Looks for threads that are stuck.
  private func look() {
    let now = MonotonicClock.nanoseconds
    for member in state.withLock({ $0.members }) {
      guard let turn = member.worker.turn(longerThan: limit, at: now) else { continue }
      guard !isChecker(member) else {
        // Whoever serves the session would be stuck as well.
        // Apart first: the checker has a session that is not apart served by others when it returns.
        let name = watch.setApart(turn.place)
        guard member.worker.condemn(turn) else {
          watch.rejoin(turn.place)
          continue
        }
        state.withLock { $0.checker = nil }
        report(member.worker.threadID, name ?? "that has left")
        continue
      }
      // Without one in its place nobody would serve the others.
      guard let reserve = state.withLock({ $0.reserve }), member.worker.condemn(turn) else {
        continue
      }
      state.withLock { state in
        state.members.append(reserve)
        state.reserve = nil
      }
      reserve.worker.takeOver(member.worker)
      reserve.serve()
      report(member.worker.threadID, watch.setApart(turn.place) ?? "that has left")
    }
    // Tried again at the next look.
    if state.withLock({ $0.reserve == nil }) { _ = try? hire(forReserve: true) }
    if state.withLock({ $0.checker == nil }) { try? hireChecker() }
    state.withLock { state in state.members.removeAll { $0.isOver } }
  }

  private func isChecker(_ member: Member) -> Bool {
    state.withLock { $0.checker === member }
  }

  private func report(_ thread: CInt, _ session: String) {
    tell(
      StuckThread(
        session: session, thread: thread, waitChannel: NamedThread.waitChannel(of: thread)))
  }
}

/// A fault thread of a pool that one session keeps in the kernel. The session has it from here on,
/// and another one is there for the others.
public struct StuckThread: Sendable, CustomStringConvertible {
  /// `PagerOptions.name` of the session.
  public let session: String
  /// The kernel's id of the thread.
  public let thread: CInt
  /// Where in the kernel it waits (/proc/PID/task/TID/wchan, proc(5)), if that can be read.
  public let waitChannel: String?

  /// One line.
  public var description: String {
    "session \(session) holds a fault thread"
      + (waitChannel.map { " in the kernel (\($0))" } ?? "")
      + " and is served by a thread of its own from here on"
  }
}
