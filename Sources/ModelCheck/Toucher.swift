// SPDX-License-Identifier: Apache-2.0

internal import CGuestProgram
internal import CLinux
internal import GuestMemoryModel
internal import LinuxSystem
internal import Synchronization
internal import SystemPackage

/// Loads or stores a word; a signal is an outcome.
func guardedTouch(_ address: UInt64, _ access: Access) -> Outcome {
  var value: UInt64 = 0
  // SAFETY: both copies are guarded: an address without a page ends in `happened`.
  let pointer = unsafe UnsafeMutableRawPointer(bitPattern: UInt(address))
  let fault: cguest_fault
  switch access {
  case .read:
    fault = unsafe cguest_guarded_copy(&value, pointer, 8)
  case .write(let new):
    value = new
    fault = unsafe cguest_guarded_copy(pointer, &value, 8)
  }
  return fault.happened == 0 ? .value(value) : .busError
}

/// Makes the touches that wait, in a thread of their own; a second thread helps a touch
/// that waits where it should not.
final class Toucher {
  static let eventTag: UInt64 = 0
  private static let resultTag: UInt64 = 1

  /// What the threads share.
  private final class Shared: Sendable {
    /// The next touch, and the result of the last.
    let job = Mutex<(request: (UInt64, Access)?, result: Outcome?)>((nil, nil))
    let requested: EventDescriptor
    let answered: EventDescriptor
    let stop: EventDescriptor
    /// Odd while the owner touches memory itself.
    let ownTouches = Atomic<UInt64>(0)
    let wasRescued = Atomic<Bool>(false)

    init() throws(Errno) {
      requested = try EventDescriptor()
      answered = try EventDescriptor()
      stop = try EventDescriptor()
    }
  }

  private let shared: Shared
  private let news: Poller
  private let userfaultfd: CInt
  private let ranges: [HostRange]
  private var threads: [ThreadBox] = []

  private final class ThreadBox {
    private var thread: NamedThread?
    init(_ thread: consuming NamedThread) { self.thread = consume thread }
    func join() { if let thread = thread.take() { thread.join() } }
  }

  init(userfaultfd: CInt, ranges: [HostRange]) throws(Errno) {
    let shared = try Shared()
    self.shared = shared
    self.userfaultfd = userfaultfd
    self.ranges = ranges
    news = try Poller()
    try news.add(userfaultfd, tag: Self.eventTag)
    try news.add(shared.answered.descriptor.rawValue, tag: Self.resultTag)
    threads.append(ThreadBox(try NamedThread(name: "model-touch") { Self.serve(shared) }))
    threads.append(
      ThreadBox(
        try NamedThread(name: "model-rescue") {
          Self.rescue(shared, userfaultfd: userfaultfd, ranges: ranges)
        }))
  }

  private static func serve(_ shared: Shared) {
    let set = PollSet(shared.requested.descriptor.rawValue, shared.stop.descriptor.rawValue)
    while true {
      guard let ready = try? set.wait() else { continue }
      if ready.tag == 1 { return }
      shared.requested.reset()
      guard let (address, access) = shared.job.withLock({ $0.request.take() }) else { continue }
      let outcome = guardedTouch(address, access)
      shared.job.withLock { $0.result = outcome }
      shared.answered.signal()
    }
  }

  /// Looks now and then whether the owner hangs in one and the same touch.
  private static func rescue(_ shared: Shared, userfaultfd: CInt, ranges: [HostRange]) {
    guard let poller = try? Poller() else { return }
    guard (try? poller.add(shared.stop.descriptor.rawValue, tag: 0)) != nil else { return }
    var seen: UInt64 = 0
    while (try? poller.wait(milliseconds: 200)) == .some(nil) {
      let now = shared.ownTouches.load(ordering: .acquiring)
      if now & 1 == 1, now == seen {
        shared.wasRescued.store(true, ordering: .releasing)
        release(userfaultfd, ranges)
      }
      seen = now
    }
  }

  private static func release(_ userfaultfd: CInt, _ ranges: [HostRange]) {
    for range in ranges {
      // A page whose protection outlived its registration would hold a writer for ever
      // (Outcome.neverEnds): register it once more, and take the protection away.
      var registration = uffdio_register()
      registration.range = uffdio_range(start: range.start.rawValue, len: UInt64(range.length))
      registration.mode = UInt64(UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_WP)
      _ = unsafe clinux_uffd_register(userfaultfd, &registration)
      var protection = uffdio_writeprotect(range: registration.range, mode: 0)
      _ = unsafe clinux_uffd_writeprotect(userfaultfd, &protection)
      var argument = uffdio_range(start: range.start.rawValue, len: UInt64(range.length))
      _ = unsafe clinux_uffd_unregister(userfaultfd, &argument)
      _ = unsafe clinux_uffd_wake(userfaultfd, &argument)
    }
  }

  // MARK: - The owner's side

  /// Touches in the calling thread; `true` when it had to be rescued.
  func touchHere(_ address: UInt64, _ access: Access) -> (Outcome, wasRescued: Bool) {
    shared.ownTouches.add(1, ordering: .acquiringAndReleasing)
    let outcome = guardedTouch(address, access)
    shared.ownTouches.add(1, ordering: .acquiringAndReleasing)
    return (outcome, shared.wasRescued.exchange(false, ordering: .acquiringAndReleasing))
  }

  /// Touches in the other thread.
  func start(_ address: UInt64, _ access: Access) {
    shared.job.withLock { $0.request = (address, access) }
    shared.requested.signal()
  }

  /// What is ready: an event or a result.
  func waitForNews(milliseconds: CInt) -> UInt64? {
    (try? news.wait(milliseconds: milliseconds))?.tag
  }

  /// The result of the touch that ended.
  func takeResult() -> Outcome? {
    shared.answered.reset()
    return shared.job.withLock { $0.result.take() }
  }

  /// Lets a touch that still waits go, and ends the threads.
  func stop() {
    Self.release(userfaultfd, ranges)
    shared.stop.signal()
    for thread in threads { thread.join() }
  }
}
