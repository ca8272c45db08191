// SPDX-License-Identifier: Apache-2.0

internal import LinuxSystem
internal import Synchronization
internal import SystemPackage

/// Calls what users of the library were asked to be told by, from a thread of its own (`report`),
/// so that a callback that takes long, or does not come back, holds up no fault.
///
/// The thread is there before there is anything to tell: at that moment threads may not be had.
final class Reporter: Sendable {
  /// Whoever has something to tell.
  protocol Sender: AnyObject, Sendable {
    /// Tells what there is. Called by one thread at a time.
    func deliver()
  }

  private struct State {
    /// First in, first out; each of them once.
    var queue: [any Sender] = []
    var isStopping = false
    var hasEnded = false
    /// Of the thread.
    var identifier: CInt = 0
  }

  private let state = Monitor(State())
  private let thread = Mutex<ThreadBox?>(nil)

  /// Starts the thread, which is there until `stop`.
  init() throws(Errno) {
    let started = ThreadBox(
      try NamedThread(name: "report") { [self] in
        let identifier = NamedThread.currentID
        state.withLock { $0.identifier = identifier }
        while let sender = next() { sender.deliver() }
      })
    thread.withLock { $0 = started }
  }

  /// Has it call somebody.
  ///
  /// - Returns: `false` when it has ended.
  func call(_ sender: any Sender) -> Bool {
    state.withLock { state in
      guard !state.hasEnded else { return false }
      state.queue.append(sender)
      return true
    }
  }

  /// Ends it once it has told all. Does not wait.
  func stop() { state.withLock { $0.isStopping = true } }

  /// Waits until the thread has ended, which was stopped, if it is not held up for longer than that
  /// by a callback; and not within one.
  func join(_ patience: UInt64) {
    guard state.withLock({ $0.identifier }) != NamedThread.currentID else { return }
    let deadline = MonotonicClock.nanoseconds &+ patience
    let hasEnded: Bool? = state.wait(until: deadline) { $0.hasEnded ? true : nil }
    if hasEnded == true { thread.withLock { $0.take() }?.join() }
  }

  private func next() -> (any Sender)? {
    state.wait { state -> (any Sender)?? in
      if !state.queue.isEmpty { return state.queue.removeFirst() }
      guard state.isStopping else { return nil }
      state.hasEnded = true
      return .some(nil)
    }
  }
}

/// What one session, or a pool, has to tell, until its reporter comes to it. It does not grow
/// without end: beyond `limit` messages are counted.
final class Outbox<Message: Sendable>: Reporter.Sender {
  private struct State {
    var waiting: [Message] = []
    /// Messages that were left out since they were last told of.
    var omitted = 0
    /// What comes after all others.
    var last: Message?
    /// It waits for the reporter, or the reporter is at it.
    var isCalled = false
    /// The thread that tells; 0 for none.
    var teller: CInt = 0
    var reporter: Reporter?

    var isEmpty: Bool { waiting.isEmpty && omitted == 0 && last == nil }
  }

  private let state = Monitor(State())
  private let limit: Int
  private let tell: @Sendable (Message) -> Void
  private let tellOmitted: @Sendable (Int) -> Void

  /// - Parameters:
  ///   - tell: called with each message.
  ///   - tellOmitted: called with how many messages were left out.
  init(
    limit: Int, _ tell: @escaping @Sendable (Message) -> Void,
    omitted tellOmitted: @escaping @Sendable (Int) -> Void
  ) {
    self.limit = limit
    self.tell = tell
    self.tellOmitted = tellOmitted
  }

  /// Who tells from here on; `nil` for nobody: what comes waits then.
  func use(_ reporter: Reporter?) {
    state.withLock { state in
      state.reporter = reporter
      call(&state)
    }
  }

  /// Posts a message. Waits for nothing but a lock that nobody holds for longer than that.
  ///
  /// - Parameter always: it is not left out. The caller sees to it that there are few of them.
  func post(_ message: Message, always: Bool = false) {
    state.withLock { state in
      if always || state.waiting.count < limit {
        state.waiting.append(message)
      } else {
        state.omitted += 1
      }
      call(&state)
    }
  }

  /// Posts the message that comes after all that were posted, and is not left out.
  func postLast(_ message: Message) {
    state.withLock { state in
      state.last = message
      call(&state)
    }
  }

  private func call(_ state: inout State) {
    guard !state.isCalled, !state.isEmpty, let reporter = state.reporter else { return }
    state.isCalled = reporter.call(self)
  }

  func deliver() {
    let batch = state.withLock { state -> State in
      defer { (state.waiting, state.omitted, state.last) = ([], 0, nil) }
      state.teller = NamedThread.currentID
      return state
    }
    for message in batch.waiting { tell(message) }
    if batch.omitted > 0 { tellOmitted(batch.omitted) }
    if let last = batch.last { tell(last) }
    state.withLock { state in
      state.isCalled = false
      state.teller = 0
      // Behind the others, who wait too.
      call(&state)
    }
  }

  /// Tells what waits for a reporter that is not there, from the calling thread.
  func deliverHere() {
    let isMine = state.withLock { state -> Bool in
      guard !state.isCalled, !state.isEmpty else { return false }
      state.isCalled = true
      return true
    }
    if isMine { deliver() }
  }

  /// Waits until all is told that was posted, but not longer than that, and not within a callback.
  func awaitDelivery(_ patience: UInt64) {
    let thread = NamedThread.currentID
    let deadline = MonotonicClock.nanoseconds &+ patience
    let _: Void? = state.wait(until: deadline) { $0.isCalled && $0.teller != thread ? nil : () }
  }
}
