// SPDX-License-Identifier: Apache-2.0

internal import GuestMemory
internal import LinuxSystem
public import MemoryImage
internal import Synchronization
internal import SystemPackage

/// How far the background filling of a session is.
public struct FillProgress: Sendable, Hashable {
  /// What it is doing.
  public enum Phase: String, Sendable {
    /// It was not started, or was stopped.
    case idle
    /// The working set comes first, as fast as it can.
    case replaying
    /// The rest, as fast as its limit and the guest's faults allow.
    case filling
    /// All is there but what has no right content; with a rate of 0, the working set.
    case done
  }
  /// What it is doing.
  public var phase = Phase.idle
  /// Bytes that were looked at.
  public var done = 0
  /// Bytes that are to be looked at.
  public var total = 0

  /// The progress of a filling that was not started.
  public init() {}

  init(phase: Phase, done: Int, total: Int) {
    (self.phase, self.done, self.total) = (phase, done, total)
  }
}

/// The thread that fills one session behind its guest's faults.
final class BackgroundFill: Sendable {
  private struct State {
    var progress = FillProgress()
    var isRunning = false
    var isStopping = false
    /// When the piece in hand was begun; nanoseconds.
    var pieceBegan: UInt64 = 0
  }

  private let state = Monitor(State())

  var progress: FillProgress { state.withLock { $0.progress } }

  /// Whether the thread is to end.
  var isStopping: Bool { state.withLock { $0.isStopping } }

  /// Whether the thread may be started; then it is to run.
  func claim(total: Int) -> Bool {
    state.withLock { state in
      guard !state.isRunning else { return false }
      state = State(
        progress: FillProgress(phase: .replaying, done: 0, total: total), isRunning: true)
      return true
    }
  }

  /// Notes that the thread is at its end, or never was.
  func finish(_ phase: FillProgress.Phase) {
    state.withLock { state in
      state.progress.phase = phase
      state.isRunning = false
    }
  }

  /// Notes what is done; `false` when the thread is to end.
  func advance(_ bytes: Int, _ phase: FillProgress.Phase) -> Bool {
    state.withLock { state in
      state.progress.done += bytes
      state.progress.phase = phase
      state.pieceBegan = MonotonicClock.nanoseconds
      return !state.isStopping
    }
  }

  /// Waits, unless the thread is to end.
  func pause(_ nanoseconds: UInt64) {
    let deadline = MonotonicClock.nanoseconds + nanoseconds
    _ = state.wait(until: deadline) { $0.isStopping ? () : nil }
  }

  /// Ends the thread and waits for it, but not for a source that does not come back.
  func stop(patience: UInt64) {
    state.withLock { $0.isStopping = true }
    while true {
      let deadline = MonotonicClock.nanoseconds + 100_000_000
      let isDone: Bool? = state.wait(until: deadline) { state in
        if !state.isRunning { return true }
        let spent = MonotonicClock.nanoseconds &- state.pieceBegan
        return state.pieceBegan > 0 && spent > patience ? true : nil
      }
      if isDone == true { return }
    }
  }
}

extension PagerSession {
  /// How far the filling in the background is.
  public var fillProgress: FillProgress { background.progress }

  /// Fills the session in the background, from a thread of its own (`fill`): first a working
  /// set in its order, then the rest. Returns at once; nothing happens when it runs already.
  ///
  /// Faults go first: they are served by other threads, and while the guest faults this one
  /// makes a pause of up to 10 ms after each piece of 256 KiB. Pages of zeros stay absent, but
  /// for those of the working set.
  ///
  /// - Parameters:
  ///   - rate: bytes a second for what is not in the working set; `nil` for no limit, 0 for the
  ///     working set only.
  ///   - onEnd: called from the thread, when all is there but what has no right content. Not
  ///     called when the filling or the session is stopped before.
  public func startFill(
    _ first: ReplayPlan, rate: Int? = nil, onEnd: (@Sendable () -> Void)? = nil
  ) throws(PagerError) {
    let rest = rate == 0 ? makeReplayPlan() : ReplayPlan(all: regions, stepLength: pagesInStep)
    guard background.claim(total: first.bytes + rest.bytes) else { return }
    // Its memory goes when it is done, and not when all is.
    let first = PlanBox(first)
    do throws(Errno) {
      let bench = try SendableBench(length: benchLength)
      _ = try NamedThread(name: "fill") {
        let isDone =
          self.fillReplaying(first.take(), bench.buffer)
          && self.fillRest(rest, rate: rate ?? 0, bench.buffer)
        self.background.finish(isDone ? .done : .idle)
        self.reports.deliverHere()
        if isDone { onEnd?() }
      }
    } catch {
      background.finish(.idle)
      throw PagerError(.resources, "no memory or thread for filling", errno: error)
    }
  }

  /// The same with a working set, of which the session's pages are brought.
  public func startFill(
    _ workingSet: [WorkingSetRun] = [], rate: Int? = nil, onEnd: (@Sendable () -> Void)? = nil
  ) throws(PagerError) {
    try startFill(makeReplayPlan(workingSet), rate: rate, onEnd: onEnd)
  }

  /// Ends the filling in the background; what is there stays.
  public func stopFill() { background.stop(patience: Self.fillPatience) }

  /// How long a stop waits for a piece that is being read, in nanoseconds.
  static var fillPatience: UInt64 { 2_000_000_000 }

  private var fillCounters: WorkerSlot { counters[counters.count - 1] }

  private func fillReplaying(_ plan: ReplayPlan, _ bench: borrowing Workbench) -> Bool {
    isReplaying.store(!plan.isEmpty, ordering: .relaxed)
    defer { isReplaying.store(false, ordering: .relaxed) }
    for window in (0..<plan.windowCount).lazy.map(plan.window) {
      guard !isStopping, background.advance(0, .replaying) else { return false }
      populate(window, of: plan, bench, fillCounters.counters, isReplay: true)
      _ = background.advance(plan.bytes(of: window), .replaying)
    }
    return !isStopping
  }

  private func fillRest(
    _ plan: ReplayPlan, rate: Int, _ bench: borrowing Workbench
  ) -> Bool {
    guard !plan.isEmpty else { return !isStopping }
    guard fillOnce(plan, rate: rate, bench, isFirst: true) else { return false }
    // Nothing is done while a page waits for its source, or was given back.
    while !isFilled {
      background.pause(20_000_000)
      guard !isStopping, !hasEnded, background.advance(0, .filling),
        fillOnce(plan, rate: rate, bench, isFirst: false)
      else { return false }
    }
    return true
  }

  private func fillOnce(
    _ plan: ReplayPlan, rate: Int, _ bench: borrowing Workbench, isFirst: Bool
  ) -> Bool {
    var faults = faultTally
    var due = MonotonicClock.nanoseconds
    for window in (0..<plan.windowCount).lazy.map(plan.window) {
      guard !isStopping, background.advance(0, .filling) else { return false }
      // A guest that faults has the source and the processors to itself, but not for ever.
      for _ in 0..<10 {
        let now = faultTally
        guard now != faults else { break }
        faults = now
        background.pause(1_000_000)
      }
      let before = fillCounters.counters.populatedPages.load(ordering: .relaxed)
      populate(window, of: plan, bench, fillCounters.counters, isReplay: false)
      let pages = fillCounters.counters.populatedPages.load(ordering: .relaxed) - before
      guard background.advance(isFirst ? plan.bytes(of: window) : 0, .filling), !isStopping
      else { return false }
      guard rate > 0, pages > 0 else { continue }
      let bytes = Double(pages) * Double(regions[window.region].pageSize.bytes)
      let now = MonotonicClock.nanoseconds
      // Time that was not used is not made up for.
      due = max(due, now &- 100_000_000) + UInt64(bytes / Double(rate) * 1e9)
      while due > MonotonicClock.nanoseconds, !isStopping, background.advance(0, .filling) {
        background.pause(min(due &- MonotonicClock.nanoseconds, 1_000_000_000))
      }
    }
    return true
  }

  /// Faults so far.
  private var faultTally: UInt64 {
    counters.reduce(0) { sum, slot in
      sum &+ slot.counters.missingFaults.load(ordering: .relaxed)
        &+ slot.counters.minorFaults.load(ordering: .relaxed)
        &+ slot.counters.stageTwoFaults.load(ordering: .relaxed)
    }
  }
}

/// A plan that is handed to a thread, and kept by nobody else.
private final class PlanBox: Sendable {
  private let plan: Mutex<ReplayPlan?>
  init(_ plan: ReplayPlan) { self.plan = Mutex(plan) }

  func take() -> ReplayPlan {
    guard let plan = plan.withLock({ $0.take() }) else { fatalError("a plan is taken once") }
    return plan
  }
}
