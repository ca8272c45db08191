// SPDX-License-Identifier: Apache-2.0

internal import LinuxSystem
internal import SystemPackage

/// Threads for work that may take its time. Some are made at the start and stay, so that there are
/// threads when no more can be made (pids cgroup, RLIMIT_NPROC); more come when all are busy, and go
/// a second later.
///
/// Work is never done by the thread that hands it over: it may hold any lock.
final class Workers: Sendable {
  typealias Job = @Sendable () -> Void

  private struct State {
    var jobs: [(number: UInt64, job: Job)] = []
    var lastNumber: UInt64 = 0
    var threads = 0
    /// Of the threads: those that have no job, and those that are about to begin.
    var idle = 0
    var isStopping = false

    mutating func add(_ job: @escaping Job) {
      lastNumber += 1
      jobs.append((lastNumber, job))
    }
  }

  private let name: String
  private let reserve: Int
  private let limit: Int
  private let state = Monitor(State())
  private static var idleTime: UInt64 { 1_000_000_000 }

  /// Makes the reserve.
  init(_ name: String, reserve: Int, limit: Int = .max) throws(Errno) {
    self.name = name
    self.reserve = reserve
    self.limit = max(reserve, limit)
    do throws(Errno) {
      for _ in 0..<reserve { try addThread() }
    } catch {
      stop(milliseconds: 1000)
      throw error
    }
  }

  /// Has a job done by a thread that is free, or a new one.
  ///
  /// - Returns: `false` when there is none, and can be none; the job is not done.
  func tryRun(_ job: @escaping Job) -> Bool {
    if take(job, queues: false) { return true }
    guard (try? addThread(with: job)) == nil else { return true }
    // One may have become free meanwhile.
    return take(job, queues: false)
  }

  /// Has a job done as soon as there is a thread for it.
  func run(_ job: @escaping Job) {
    if take(job, queues: false) { return }
    guard (try? addThread(with: job)) == nil else { return }
    _ = take(job, queues: true)
  }

  /// Jobs that are done, or wait.
  var jobCount: Int { state.withLock { $0.threads - $0.idle + $0.jobs.count } }

  /// Waits until there is no job; `false` when the time was over before that.
  func waitUntilIdle(milliseconds: UInt64) -> Bool {
    let deadline = MonotonicClock.nanoseconds + milliseconds * 1_000_000
    return state.wait(until: deadline) { $0.threads == $0.idle && $0.jobs.isEmpty ? () : nil }
      != nil
  }

  /// Ends the threads that have nothing to do, and the others when they are through with it. Waits
  /// for that for some time; jobs that nobody has begun are dropped.
  func stop(milliseconds: UInt64) {
    state.withLock { $0.isStopping = true }
    let deadline = MonotonicClock.nanoseconds + milliseconds * 1_000_000
    let _: Void? = state.wait(until: deadline) { $0.threads == 0 ? () : nil }
  }

  // MARK: - Threads

  private func take(_ job: @escaping Job, queues: Bool) -> Bool {
    state.withLock { state in
      guard queues || state.idle > state.jobs.count else { return false }
      state.add(job)
      return true
    }
  }

  /// Makes a thread, for a job that nobody else can take before it: it is in the queue, and not kept by
  /// the thread, for as long as that lives.
  private func addThread(with job: Job? = nil) throws(Errno) {
    let number = try state.withLock { (state) throws(Errno) -> UInt64? in
      guard state.threads < limit, !state.isStopping else {
        throw .resourceTemporarilyUnavailable
      }
      state.threads += 1
      state.idle += 1
      guard let job else { return nil }
      state.add(job)
      return state.lastNumber
    }
    do throws(Errno) {
      _ = try NamedThread(name: name) { [self] in serve() }
    } catch {
      let isTaken = state.withLock { state in
        state.threads -= 1
        state.idle -= 1
        guard let index = state.jobs.firstIndex(where: { $0.number == number }) else { return true }
        state.jobs.remove(at: index)
        return false
      }
      // A thread that became free meanwhile may have it.
      if number == nil || !isTaken { throw error }
    }
  }

  private func serve() {
    while true {
      // The reserve stays, and sleeps.
      let isExtra = state.withLock { $0.threads > reserve }
      let deadline = isExtra ? MonotonicClock.nanoseconds + Self.idleTime : .max
      let job = state.wait(until: deadline) { state -> Job?? in
        if !state.jobs.isEmpty {
          state.idle -= 1
          return .some(state.jobs.removeFirst().job)
        }
        return state.isStopping ? .some(nil) : nil
      }
      switch job {
      case .some(.some(let job)):
        job()
        state.withLock { $0.idle += 1 }
      case .some(.none):
        return leave()
      case .none:
        let isOne = state.withLock { state in
          guard state.threads > reserve, state.jobs.isEmpty else { return false }
          state.idle -= 1
          state.threads -= 1
          return true
        }
        if isOne { return }
      }
    }
  }

  private func leave() {
    state.withLock { state in
      state.idle -= 1
      state.threads -= 1
    }
  }
}
