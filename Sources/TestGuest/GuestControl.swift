// SPDX-License-Identifier: Apache-2.0

internal import LinuxSystem

/// What the guest's owner and its vCPU threads tell each other.
///
/// Each vCPU thread asks what to do when its guest does (for work, after a batch) and
/// when it was kicked; the owner sets requests and waits until all have followed.
final class GuestControl: Sendable {
  struct Processor: Sendable {
    /// Items that the guest has not begun.
    var queue: [WorkloadItem] = []
    /// The item that it is at.
    var running: WorkloadItem?
    var results: [WorkloadResult] = []
    var batches: UInt64 = 0
    var isParked = false
    var hasEnded = false
    var failure: GuestError?

    var isIdle: Bool { (queue.isEmpty && running == nil) || hasEnded }
  }

  struct State: Sendable {
    var processors: [Processor]
    var interval: UInt64 = 0
    /// For each vCPU the bytes of the sample buffer that its workload writes.
    var sampleParts: [Range<Int>] = []
    var startedAt: UInt64
    var finishedAt: UInt64 = 0
    var firstExitAt: UInt64?
    /// A workload was started whose report nobody has taken.
    var isBusy: Bool
    var isStopping = false
    var isPausing = false
    var isEnding = false
  }

  /// What a vCPU thread is to do.
  enum Order {
    case item(WorkloadItem)
    case proceed
    case stop
    case park
    case end
  }

  let monitor: Monitor<State>

  init(_ processors: [Processor]) {
    monitor = Monitor(
      State(
        processors: processors, startedAt: MonotonicClock.nanoseconds,
        isBusy: processors.contains { !$0.isIdle || !$0.results.isEmpty }))
  }

  // MARK: - Called by vCPU threads

  /// The guest is idle and asks for work; waits for some.
  func next(_ index: Int) -> Order {
    monitor.wait { state in
      if state.isEnding { return .end }
      if state.isPausing { return .park }
      guard !state.processors[index].queue.isEmpty else { return nil }
      let item = state.processors[index].queue.removeFirst()
      state.processors[index].running = item
      return .item(item)
    }
  }

  /// The guest has done a batch and would go on; waits as long as the rate asks for.
  func afterBatch(_ index: Int) -> Order {
    let interval = monitor.withLock { state in
      state.processors[index].batches += 1
      return state.interval
    }
    if interval == 0 { return request() }
    let order = monitor.wait(until: MonotonicClock.nanoseconds + interval) { state -> Order? in
      let order = Self.request(state)
      if case .proceed = order { return nil }
      return order
    }
    return order ?? .proceed
  }

  /// What the owner wants, without waiting.
  func request() -> Order { monitor.withLock { Self.request($0) } }

  private static func request(_ state: State) -> Order {
    if state.isEnding { return .end }
    if state.isPausing { return .park }
    return state.isStopping ? .stop : .proceed
  }

  /// Stands still until the guest is resumed; `false` when it is to end instead.
  func park(_ index: Int) -> Bool {
    monitor.withLock { $0.processors[index].isParked = true }
    return monitor.wait { state in
      if state.isPausing && !state.isEnding { return nil }
      state.processors[index].isParked = false
      return !state.isEnding
    }
  }

  /// The guest has ended its item.
  func finish(_ index: Int, _ result: WorkloadResult) {
    monitor.withLock { state in
      state.processors[index].running = nil
      // The batch that ended it asked for nothing.
      state.processors[index].batches += 1
      state.processors[index].results.append(result)
      Self.noteProgress(&state)
    }
  }

  /// The thread ends, with an error or because it was told to.
  func end(_ index: Int, _ failure: GuestError?) {
    monitor.withLock { state in
      state.processors[index].hasEnded = true
      state.processors[index].failure = failure
      // The others need not go on with a workload that has failed.
      if failure != nil { Self.stop(&state) }
      Self.noteProgress(&state)
    }
  }

  private static func noteProgress(_ state: inout State) {
    if state.processors.allSatisfy(\.isIdle) { state.finishedAt = MonotonicClock.nanoseconds }
  }

  /// The guest did something that it cannot do without running.
  func noteExit() {
    let now = MonotonicClock.nanoseconds
    monitor.withLock { if $0.firstExitAt == nil { $0.firstExitAt = now } }
  }

  private static func stop(_ state: inout State) {
    state.isStopping = true
    for index in state.processors.indices {
      // What was not begun, or not gone on with after a restore, is reported as it is.
      state.processors[index].results += state.processors[index].queue.map { WorkloadResult($0) }
      state.processors[index].queue.removeAll()
    }
    noteProgress(&state)
  }

  // MARK: - Called by the owner

  /// Ends the workload at the next batch of each vCPU.
  func stop() { monitor.withLock { Self.stop(&$0) } }

  func requestPause() { monitor.withLock { $0.isPausing = true } }

  /// Waits until every vCPU stands still or has ended.
  func waitUntilParked() {
    monitor.wait { $0.processors.allSatisfy { $0.isParked || $0.hasEnded } ? () : nil }
  }

  /// Lets parked vCPUs go on, and waits until they do, so that a second pause cannot
  /// take the first one's stand for its own.
  func resume() {
    monitor.withLock { $0.isPausing = false }
    monitor.wait { $0.processors.allSatisfy { !$0.isParked || $0.hasEnded } ? () : nil }
  }

  func requestEnd() { monitor.withLock { $0.isEnding = true } }

  private static func requireIdle(_ state: State) throws(GuestError) {
    guard !state.isEnding else {
      throw GuestError(.wrongState, "The guest was shut down; boot or restore a new one")
    }
    guard !state.isBusy else {
      throw GuestError(.wrongState, "The guest has a workload; wait for it first")
    }
    if let failure = state.processors.lazy.compactMap(\.failure).first { throw failure }
  }

  /// Throws unless a workload can be started.
  func requireIdle() throws(GuestError) {
    try monitor.withLock { state throws(GuestError) in try Self.requireIdle(state) }
  }

  func start(_ plan: WorkloadPlan, interval: UInt64) throws(GuestError) {
    try monitor.withLock { state throws(GuestError) in
      try Self.requireIdle(state)
      for index in plan.items.indices {
        state.processors[index].queue = plan.items[index]
        state.processors[index].results = []
        state.processors[index].batches = 0
      }
      state.interval = interval
      state.sampleParts = plan.sampleParts
      state.isBusy = true
      state.isStopping = false
      state.startedAt = MonotonicClock.nanoseconds
      Self.noteProgress(&state)
    }
  }

  /// Waits for the end of the workload and returns the state at that time.
  func wait() throws(GuestError) -> State {
    let final = monitor.wait { state -> State? in
      guard state.processors.allSatisfy(\.isIdle) else { return nil }
      defer {
        state.isBusy = false
        // Taken: a guest saved from here on has no report to give.
        for index in state.processors.indices { state.processors[index].results = [] }
      }
      return state
    }
    if let failure = final.processors.lazy.compactMap(\.failure).first { throw failure }
    guard final.isBusy else {
      throw GuestError(.wrongState, "No workload was started")
    }
    return final
  }
}
