// SPDX-License-Identifier: Apache-2.0

internal import GuestMemory
internal import LinuxSystem
internal import Synchronization
internal import SystemPackage
internal import Userfault

/// The pages of one session whose content is not at hand, and the threads that may wait for it,
/// so that faults on other pages, and other sessions, go on meanwhile.
///
/// The threads come with the first such page and go when there was none for a second. Another
/// one watches them: a page that has waited for longer than the time limit is given up, whatever
/// the thread that reads it is stuck in.
final class SourceLane<Source: PageSource>: Sendable {
  /// A page that a fault thread has claimed, or whose waiters are to look again after a while.
  struct Job {
    var address: HostAddress
    var isClaimed = true
    /// As of `PagerSession.resolve`.
    var window: Int
    /// When its fault was read.
    var received: UInt64
  }

  private struct State {
    /// First in, first out.
    var queue: [Job] = []
    /// What each thread is reading.
    var active: [Job?]
    /// Threads whose page was given up: they are stuck, and nobody waits for them.
    var isStuck: [Bool]
    var isRunning: [Bool]
    var idle = 0
    var isWatched = false
    var isStopping = false

    /// A thread that can be started.
    var freeThread: Int? { isRunning.firstIndex(of: false) }
    var liveCount: Int { zip(isRunning, isStuck).count { $0 && !$1 } }

    /// Waits for none of the threads any more; what they have in hand.
    mutating func abandonAll() -> [Job] {
      defer { isStuck = isRunning }
      return zip(active, isStuck).compactMap { job, isStuck in isStuck ? nil : job }
    }
  }

  private static var stopPatience: UInt64 { 2_000_000_000 }

  private enum Next {
    case job(Job)
    case end
  }

  private let threads: Int
  private let timeout: UInt64
  /// Of the threads' counters; the watch's are the last.
  private let firstCounters: Int
  private let state: Monitor<State>
  /// How long a thread stays without work, in nanoseconds.
  private static var idleLimit: UInt64 { 1_000_000_000 }

  /// - Parameters:
  ///   - timeout: for each page, in nanoseconds.
  ///   - firstCounters: place of its threads' counters in the session's.
  init(threads: Int, timeout: UInt64, firstCounters: Int) {
    self.threads = max(1, threads)
    self.timeout = timeout
    self.firstCounters = firstCounters
    let none = [Bool](repeating: false, count: self.threads)
    state = Monitor(
      State(active: Array(repeating: nil, count: self.threads), isStuck: none, isRunning: none))
  }

  /// Pages that wait or are being read.
  var depth: Int {
    state.withLock { state in state.queue.count + state.active.count { $0 != nil } }
  }

  // MARK: - Taking and ending

  /// Has a claimed page read. Called by fault threads; waits for nothing but the lock.
  ///
  /// - Returns: `false` where no thread can be had for it, such as in a pids cgroup that is full.
  ///   Where there is none at all the page was given back, and who waits for it was woken.
  func take(_ job: Job, of session: PagerSession<Source>) -> Bool {
    let (thread, watches) = state.withLock { state -> (Int?, Bool) in
      guard !state.isStopping else { return (nil, false) }
      state.queue.append(job)
      guard state.idle < state.queue.count, let free = state.freeThread else {
        return (nil, false)
      }
      state.isRunning[free] = true
      defer { state.isWatched = true }
      return (free, !state.isWatched)
    }
    if watches { startWatch(session) }
    guard let thread else { return true }
    do throws(Errno) {
      let bench = try SendableBench(length: session.benchLength)
      // The handle is let go of: `stop` waits for the state, not for the thread.
      _ = try NamedThread(name: "source\(thread)") {
        self.run(thread, bench.buffer, session)
      }
      return true
    } catch {
      let orphans = state.withLock { state -> [Job] in
        state.isRunning[thread] = false
        guard state.liveCount == 0 else { return [] }
        defer { state.queue = [] }
        return state.queue
      }
      for job in orphans { giveBack(job, session) }
      return false
    }
  }

  /// Ends the threads, when each is done with its page, and gives back what waits. Threads that
  /// are stuck stay behind, also those that are not done after a while: their pages are given back,
  /// and what they bring later finds its claim gone.
  func stop(_ session: PagerSession<Source>) {
    let waiting = state.withLock { state -> [Job] in
      state.isStopping = true
      defer { state.queue = [] }
      return state.queue
    }
    for job in waiting { giveBack(job, session) }
    let deadline = MonotonicClock.nanoseconds &+ min(timeout, Self.stopPatience)
    let isDone: Void? = state.wait(until: deadline) { $0.liveCount == 0 ? () : nil }
    if isDone == nil {
      for job in state.withLock({ $0.abandonAll() }) { giveBack(job, session) }
    }
    // It looks at once when nothing lives any more.
    let _: Void? = state.wait(until: deadline &+ Self.stopPatience) { $0.isWatched ? nil : () }
    state.withLock { $0.isStopping = false }
  }

  private func giveBack(_ job: Job, _ session: PagerSession<Source>) {
    guard let region = session.region(at: job.address) else { return }
    let page = region.page(of: job.address)
    if job.isClaimed {
      session.giveBack(region, page..<page + 1)
    } else {
      session.memory.wake(region.range(of: page))
    }
  }

  // MARK: - The threads

  private func run(
    _ thread: Int, _ bench: borrowing Workbench, _ session: PagerSession<Source>
  ) {
    let slot = session.counters[firstCounters + thread]
    while case .job(let job) = next(thread) {
      session.settle(job, bench, slot.counters)
      slot.counters.serviceTime.record(MonotonicClock.nanoseconds &- job.received)
      state.withLock { state in
        state.active[thread] = nil
        state.isStuck[thread] = false
      }
    }
  }

  /// The next page for a thread, or its end, which it takes part in no more then.
  private func next(_ thread: Int) -> Next {
    state.withLock { $0.idle += 1 }
    let deadline = MonotonicClock.nanoseconds + Self.idleLimit
    let found = state.wait(until: deadline) { state -> Next? in
      if state.isStopping { return .end }
      guard !state.queue.isEmpty else { return nil }
      let job = state.queue.removeFirst()
      state.active[thread] = job
      state.idle -= 1
      return .job(job)
    }
    if case .job(let job) = found { return .job(job) }
    return state.withLock { state in
      // One that came just now.
      if !state.isStopping, !state.queue.isEmpty {
        let job = state.queue.removeFirst()
        state.active[thread] = job
        state.idle -= 1
        return .job(job)
      }
      state.idle -= 1
      state.isRunning[thread] = false
      return .end
    }
  }

  // MARK: - The watch

  private func startWatch(_ session: PagerSession<Source>) {
    do throws(Errno) {
      let bench = try SendableBench(length: session.benchLength)
      _ = try NamedThread(name: "sourcewatch") { self.watch(bench.buffer, session) }
    } catch {
      // Without it nothing is given up; a page that does not come waits.
      state.withLock { $0.isWatched = false }
    }
  }

  private func watch(_ bench: borrowing Workbench, _ session: PagerSession<Source>) {
    let slot = session.counters[firstCounters + threads]
    let interval = min(max(timeout / 8, 1_000_000), 1_000_000_000)
    while true {
      let deadline = MonotonicClock.nanoseconds + interval
      let isDone: Bool? = state.wait(until: deadline) { state in
        guard state.liveCount == 0, state.queue.isEmpty || state.isStopping else { return nil }
        state.isWatched = false
        return true
      }
      if isDone == true { return }
      for job in overdue(at: MonotonicClock.nanoseconds) {
        session.giveUp(
          job, bench, slot.counters,
          reason: "its source did not answer for \(Double(timeout) / 1e9) s")
      }
    }
  }

  /// Takes what waits or is being read for too long out of the lane.
  private func overdue(at now: UInt64) -> [Job] {
    state.withLock { state in
      var overdue = state.queue.filter { now &- $0.received > timeout }
      state.queue.removeAll { now &- $0.received > timeout }
      for (thread, job) in state.active.enumerated() {
        // A thread that asks again by itself gives up by itself: half as long again.
        guard let job, !state.isStuck[thread], now &- job.received > timeout + timeout / 2 else {
          continue
        }
        state.isStuck[thread] = true
        overdue.append(job)
      }
      return overdue
    }
  }
}

/// Carries a thread's bench into its closure.
final class SendableBench: Sendable {
  let buffer: Workbench
  init(length: Int) throws(Errno) { buffer = try Workbench(length: length, waits: true) }
}

extension PagerSession {
  /// Pages whose content is being waited for, beyond what fault threads have in hand.
  public var pendingReads: Int { lane.depth }

  /// Settles a page of the lane, waiting for its content, or for memory.
  func settle(
    _ job: SourceLane<Source>.Job, _ bench: borrowing Workbench,
    _ counters: borrowing WorkerCounters
  ) {
    guard let region = region(at: job.address) else { return }
    let page = region.page(of: job.address)
    guard job.isClaimed else {
      Pause.microseconds(Self.shortagePace)
      memory.wake(region.range(of: page))
      return
    }
    settleClaimed(page, window: job.window, region, bench, counters)
  }

  /// Settles a page that this thread has claimed, waiting for its content, or for memory.
  func settleClaimed(
    _ page: Int, window: Int, _ region: PagedRegion, _ bench: borrowing Workbench,
    _ counters: borrowing WorkerCounters
  ) {
    finish(
      fetchAndInstall(page, window: window, region, bench, counters), page, region, bench, counters)
  }

  /// Goes on until an outcome is final.
  private func finish(
    _ outcome: FaultOutcome, _ page: Int, _ region: PagedRegion, _ bench: borrowing Workbench,
    _ counters: borrowing WorkerCounters
  ) {
    var outcome = outcome
    while true {
      switch outcome {
      case .resolved, .ended: return
      case .retry:
        guard !isStopping else { return }
        // An event may have changed the page meanwhile, so from here on it is a fault like
        // any other: whatever it has become, those who wait for it are woken.
        Pause.microseconds(50)
        outcome = resolve(
          PageFault(address: region.range(of: page).start, flags: []), bench: bench,
          counters: counters)
      case .deferred:
        guard !isStopping else { return giveBack(region, page..<page + 1) }
        Pause.microseconds(Self.shortagePace)
        outcome = fetchAndInstall(page, region, bench, counters)
      case .doubtful:
        Pause.microseconds(Self.shortagePace)
        return memory.wake(region.range(of: page))
      case .foreign: return memory.wake(region.range(of: page))
      }
    }
  }

  /// Gives a page of the lane up that takes too long.
  func giveUp(
    _ job: SourceLane<Source>.Job, _ bench: borrowing Workbench,
    _ counters: borrowing WorkerCounters, reason: String
  ) {
    guard let region = region(at: job.address) else { return }
    let page = region.page(of: job.address)
    guard job.isClaimed else { return memory.wake(region.range(of: page)) }
    finish(
      fail(page, region, counters, expecting: .filling, reason: reason), page, region, bench,
      counters)
  }
}
