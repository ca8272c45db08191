// SPDX-License-Identifier: Apache-2.0

internal import Glibc
internal import LinuxSystem
internal import Logging
internal import SystemPackage

/// Writes lines to standard error, in a thread of its own. Whoever has a line never waits: the
/// queue has an end, and a line that cannot be written is counted and dropped.
final class LogWriter: Sendable {
  /// Lines that were not written, since the start.
  struct Dropped: Sendable {
    /// More than a source may have.
    var rate: UInt64 = 0
    /// The queue was full: standard error is a pipe that nobody reads.
    var queue: UInt64 = 0
    /// The kernel refused them.
    var write: UInt64 = 0
  }

  private struct State {
    var lines: [[UInt8]] = []
    var limiter: LogLimiter
    var dropped = Dropped()
    /// Of those above, what was said already.
    var said = Dropped()
    var isWriting = false
    /// What was left out is said at once.
    var isFlushing = false
    var lastNotice: UInt64 = 0
    /// The last one could not be written. What was left out is said when one can be again.
    var isFailing = false

    var hasNotice: Bool {
      guard !isFailing else { return false }
      return limiter.hasLeftOut || dropped.queue != said.queue || dropped.write != said.write
    }
  }

  /// Lines that wait.
  private static let queueLimit = 4096
  private static let noticeInterval: UInt64 = 1_000_000_000

  let text: LogText
  private let state: Monitor<State>

  /// Starts the thread.
  init(_ text: LogText) throws(Errno) {
    self.text = text
    Self.openStandardDescriptors()
    state = Monitor(State(limiter: LogLimiter(now: MonotonicClock.nanoseconds)))
    _ = try NamedThread(name: "log") { [self] in run() }
  }

  /// A standard descriptor that is closed would be the number of the next thing that is opened: lines
  /// would go into a VMM's memory.
  private static func openStandardDescriptors() {
    for number in CInt(0)...2 where fcntl(number, F_GETFD) < 0 {
      // The lowest that is free: this one.
      _ = unsafe open("/dev/null", O_RDWR)
    }
  }

  // MARK: - Lines

  /// Whether there is to be a line; if not, it was counted.
  func admits(_ source: LogLimiter.Source) -> Bool {
    let now = MonotonicClock.nanoseconds
    return state.withLock { state in
      guard state.limiter.admits(source, now: now) else {
        state.dropped.rate += 1
        return false
      }
      guard state.lines.count < Self.queueLimit else {
        state.dropped.queue += 1
        return false
      }
      return true
    }
  }

  func append(_ line: [UInt8]) {
    state.withLock { state in
      guard state.lines.count < Self.queueLimit else {
        state.dropped.queue += 1
        return
      }
      state.lines.append(line)
    }
  }

  var dropped: Dropped { state.withLock { $0.dropped } }

  /// Waits until all that was logged is written, or the time is over.
  func flush(milliseconds: UInt64) {
    state.withLock { $0.isFlushing = true }
    let deadline = MonotonicClock.nanoseconds + milliseconds * 1_000_000
    let _: Void? = state.wait(until: deadline) { state in
      state.lines.isEmpty && !state.isWriting && !state.hasNotice ? () : nil
    }
  }

  // MARK: - The thread

  private enum Work {
    case lines([[UInt8]])
    case notice([(source: LogLimiter.Source, count: UInt64)], queue: UInt64, write: UInt64)
  }

  private func run() {
    // Whether what was written last was cut within a line.
    var isCut = false
    while true {
      let now = MonotonicClock.nanoseconds
      let work = state.wait(until: now + Self.noticeInterval) { Self.next(&$0) }
      let isIdle = state.withLock { !$0.hasNotice && $0.lines.isEmpty }
      switch work {
      case .none where isIdle: state.wait { $0.hasNotice || !$0.lines.isEmpty ? () : nil }
      case .none: break
      case .lines(let lines):
        for line in lines { write(line, &isCut) }
      case .notice(let leftOut, let queue, let write):
        self.write(Self.notice(leftOut, queue, write, text), &isCut)
      }
      state.withLock { $0.isWriting = false }
    }
  }

  private static func next(_ state: inout State) -> Work? {
    let now = MonotonicClock.nanoseconds
    let isDue = state.isFlushing ? state.lines.isEmpty : now >= state.lastNotice + noticeInterval
    if state.hasNotice, isDue {
      let (queue, write) = (
        state.dropped.queue - state.said.queue, state.dropped.write - state.said.write
      )
      state.said = state.dropped
      state.lastNotice = now
      state.isWriting = true
      return .notice(state.limiter.takeLeftOut(), queue: queue, write: write)
    }
    guard !state.lines.isEmpty else { return nil }
    // Few at a time: what is taken out of the queue is no longer in its count.
    let lines = Array(state.lines.prefix(64))
    state.lines.removeFirst(lines.count)
    state.isWriting = true
    return .lines(lines)
  }

  private static func notice(
    _ leftOut: [(source: LogLimiter.Source, count: UInt64)], _ queue: UInt64, _ write: UInt64,
    _ text: LogText
  ) -> [UInt8] {
    var parts: [String] = []
    if !leftOut.isEmpty {
      let sum = leftOut.reduce(0) { $0 + $1.count }
      let named = leftOut.prefix(8).map { "\($0.count) of \($0.source)" }
      let rest = leftOut.count > 8 ? ", and of \(leftOut.count - 8) others" : ""
      parts.append(
        "\(sum) lines were left out, there were too many: \(named.joined(separator: ", "))\(rest)")
    }
    if queue > 0 { parts.append("\(queue) lines were dropped while nobody read the log") }
    if write > 0 { parts.append("\(write) lines could not be written") }
    return text.line(.warning, parts.joined(separator: "; "))
  }

  /// One that cannot be written is counted. Waits as long as nobody reads.
  private func write(_ line: [UInt8], _ isCut: inout Bool) {
    let bytes = isCut ? [UInt8(ascii: "\n")] + line : line
    var done = 0
    while done < bytes.count {
      let result = unsafe bytes.withUnsafeBytes { buffer in
        // SAFETY: `done` is less than the buffer's length.
        unsafe Glibc.write(2, buffer.baseAddress.unsafelyUnwrapped + done, buffer.count - done)
      }
      if result > 0 {
        done += result
        continue
      }
      if result < 0, errno == EINTR { continue }
      if result < 0, errno == EAGAIN {
        // Somebody who has it as well does not want to wait.
        var set = pollfd(fd: 2, events: Int16(POLLOUT), revents: 0)
        _ = unsafe poll(&set, 1, 100)
        continue
      }
      break
    }
    if done > 0 { isCut = done < bytes.count }
    state.withLock { state in
      state.isFailing = done < bytes.count
      if state.isFailing { state.dropped.write += 1 }
    }
  }
}
