// SPDX-License-Identifier: Apache-2.0

internal import GuestMemory
public import LinuxSystem
internal import Synchronization
internal import SystemPackage
public import Userfault

/// Serves the page faults of one guest from one source.
///
/// `start` → faults are served by named threads → `stop` (waiters wait, nothing is
/// lost) → `start` again, or `release` when no guest uses the memory any more.
///
/// **A page that enters the guest is right, or the guest is told**: what the source
/// cannot vouch for is poisoned, never filled with something else.
///
/// How threads stay out of each other's way, without a lock across sessions:
/// - `gate` orders events against resolutions. Whoever *reads* the userfaultfd holds
///   it alone; whoever checks a page's state, resolves the page and records the new
///   state holds it together with others. So when a remove event has been read, no
///   copy of old content is on its way to the page that madvise is about to drop, and
///   a fault that was raised after a resolution is read after its state was recorded.
/// - A page is claimed (`absent` → `filling`) before its content is fetched, which
///   happens outside of the gate. Others drop their faults on it: those waiters queued
///   up before the resolution, which wakes them.
public final class PagerSession<Source: PageSource>: Sendable {
  let memory: WatchedMemory
  let regions: [PagedRegion]
  let source: Source
  let options: PagerOptions
  let canPoison: Bool
  let recorder: AccessRecorder

  let gate = ReadWriteLock()
  let lane: SourceLane<Source>
  let background = BackgroundFill()
  /// Since when pages cannot be had for want of memory; 0 when the last one was had.
  let shortSince = Atomic<UInt64>(0)
  /// Whether a thread is stuck that holds the gate; see `withGate`.
  let gateIsLost = Atomic<Bool>(false)
  /// Serves the session again, as it was the last time.
  let restart = Mutex<(@Sendable (PagerSession) throws(PagerError) -> Void)?>(nil)
  /// When the last one could not be had.
  let shortLast = Atomic<UInt64>(0)
  /// Whether the memory was let go of. A thread that comes back from a source after that touches
  /// nothing any more: the kernel asks whether memory is registered, and not with whose
  /// userfaultfd, so it would fill what lies at that address by then. Read with the gate held.
  let isReleased = Atomic<Bool>(false)
  /// `PagerOptions.sourceTimeout`, at most a year: sums with it do not overflow.
  let sourceTimeout: UInt64
  /// Whether a working set is being brought: what lies around a fault is wanted, too, then.
  let isReplaying = Atomic<Bool>(false)
  let stopSign: EventDescriptor
  private let stopRequested = Atomic<Bool>(false)
  let counters: [WorkerSlot]
  let process: WatchedProcess
  private let state = Mutex(State())
  let reports: Outbox<Report>
  /// Held by whoever starts or stops the threads, so that two do not.
  private let lifecycle = Mutex(())

  /// Why a session serves no more.
  enum End: Sendable { case processGone, failed(Errno), protectionFault, movedTooOften, abandoned }

  /// What serves the session.
  struct Serving {
    /// Joins the threads that serve, or leaves the pool; `false` when one stays behind.
    var end: @Sendable () -> Bool
    /// Tells what it has to tell.
    var reporter: Reporter
    /// The reporter is there for this session only.
    var ownsReporter: Bool
  }

  private struct State {
    /// `nil` while nobody serves.
    var serving: Serving?
    var failures: [PageFailure] = []
    var failureCount = 0
    var end: End?
    var children: ForkedChildren?
  }

  final class WorkerSlot: Sendable { let counters = WorkerCounters() }

  /// How many failures are kept with their details.
  static var failureLimit: Int { 64 }

  /// Prepares a session; nothing is served before `start`.
  ///
  /// - Parameters:
  ///   - userfaultfd: of the guest's process. Ask for `PagerSession.features`.
  ///   - regions: what to serve; they may not overlap.
  ///   - registers: `false` when the other side registered the ranges already.
  ///   - process: a pidfd of the guest's process. With it an idle session ends when the
  ///     process does; without it only the next fault finds out.
  public init(
    userfaultfd: consuming Userfaultfd, regions: [PagedRegion], source: Source,
    options: PagerOptions = PagerOptions(), registers: Bool = true,
    process: consuming OwnedDescriptor? = nil
  ) throws(PagerError) {
    try Self.validate(regions)
    guard regions.allSatisfy({ $0.share == nil }) || userfaultfd.features.contains(.removeEvents)
    else {
      throw PagerError(.invalidRegion, "a clone's userfaultfd needs REMOVE events, and has none")
    }
    let userfaultfd = userfaultfd
    if registers {
      for region in regions {
        do {
          try userfaultfd.register(region.host, modes: region.registration)
        } catch {
          throw PagerError(
            .registration, "userfaultfd refuses \(region.registration) on \(region.host)",
            errno: error)
        }
      }
    }
    do {
      stopSign = try EventDescriptor()
      recorder = AccessRecorder(pages: regions.reduce(0) { $0 + $1.pageCount })
      if options.records { try recorder.start() }
    } catch {
      throw PagerError(.resources, "no eventfd or memory for a session", errno: error)
    }
    canPoison = userfaultfd.features.contains(.poison) && options.onDamage == .poison
    memory = WatchedMemory(userfaultfd)
    self.regions = regions.sorted { $0.host.start < $1.host.start }
    self.source = source
    self.options = options
    self.process = WatchedProcess(process)
    reports = Self.makeReports(options, self.process)
    sourceTimeout = min(options.sourceTimeout, 365 * 86_400 * 1_000_000_000)
    let threads = options.faultThreads + options.populateThreads + options.stageTwoThreads
    lane = SourceLane(
      threads: options.sourceThreads, timeout: sourceTimeout, firstCounters: threads)
    // And the lane's watch, and the filling in the background.
    counters = (0..<(threads + options.sourceThreads + 2)).map { _ in WorkerSlot() }
  }

  deinit { stop() }

  /// What a userfaultfd for a session needs, and what is used where it is there.
  public static var features: (required: UserfaultFeatures, wanted: UserfaultFeatures) {
    (
      [],
      [
        .missingShmem, .missingHugetlbfs, .minorShmem, .minorHugetlbfs, .removeEvents,
        .unmapEvents, .remapEvents, .poison,
      ]
    )
  }

  private static func validate(_ regions: [PagedRegion]) throws(PagerError) {
    var previous: HostRange?
    for region in regions.sorted(by: { $0.host.start < $1.host.start }) {
      guard Int(region.host.start.rawValue) & (region.pageSize.bytes - 1) == 0,
        region.sourceOffset & 4095 == 0, region.sourceOffset >= 0
      else {
        throw PagerError(
          .invalidRegion, "region \(region.host) is not aligned to its \(region.pageSize) pages")
      }
      if let previous, region.host.start < previous.end {
        throw PagerError(.invalidRegion, "regions \(previous) and \(region.host) overlap")
      }
      previous = region.host
    }
  }

  // MARK: - Life cycle

  /// Starts the fault threads, and one that calls `onFailure` and the like (`report`). Waiters that
  /// an earlier handler left behind are woken and fault again.
  public func start() throws(PagerError) {
    restart.withLock { $0 = { (session) throws(PagerError) in try session.start() } }
    try begin { () throws(PagerError) in
      var threads: [ThreadBox] = []
      do throws(Errno) {
        let reporter = try Reporter()
        do throws(Errno) {
          for index in 0..<options.faultThreads {
            let worker = try FaultWorkerBox(session: self, index: index)
            let thread = try NamedThread(name: "fault\(index)") { worker.run() }
            threads.append(ThreadBox(thread))
          }
        } catch {
          reporter.stop()
          throw error
        }
        let started = threads
        return Serving(
          end: {
            for thread in started { thread.join() }
            return true
          }, reporter: reporter, ownsReporter: true)
      } catch {
        requestStop()
        for thread in threads { thread.join() }
        throw PagerError(.resources, "no thread for serving faults", errno: error)
      }
    }
  }

  /// Begins to serve if it does not yet.
  ///
  /// - Parameter serve: has faults served from here on, and returns what ends that once a stop
  ///   was requested.
  /// - Parameter spare: the descriptor in reserve; `nil` for one of its own.
  func begin(
    spare: SpareDescriptor? = nil, _ serve: () throws(PagerError) -> Serving
  ) throws(PagerError) {
    try lifecycle.withLock { _ throws(PagerError) in
      if let error = endError { throw error }
      guard state.withLock({ $0.serving == nil }) else { return }
      stopSign.reset()
      stopRequested.store(false, ordering: .releasing)
      let children = try makeChildren(spare)
      state.withLock { $0.children = children }
      do throws(PagerError) {
        let serving = try serve()
        state.withLock { $0.serving = serving }
        reports.use(serving.reporter)
      } catch {
        endChildren()
        throw error
      }
      wakeAll()
    }
  }

  /// Stops serving and returns when no thread serves any more. The regions stay
  /// registered: whoever faults waits until `start` or `release`.
  ///
  /// A thread of a pool that the guest keeps in the kernel is waited for for
  /// `PagerPool.init(patience:)`; then the session has ended, and the thread ends when it comes back.
  ///
  /// Waits for callbacks that are due or under way for a second at most, and does not when it is
  /// called from within one.
  public func stop() {
    let reporter = lifecycle.withLock { _ -> Reporter? in
      requestStop()
      let serving = state.withLock { state in
        defer { state.serving = nil }
        return state.serving
      }
      if let serving, !serving.end() { end(.abandoned) }
      lane.stop(self)
      background.stop(patience: Self.fillPatience)
      endChildren()
      reports.use(nil)
      guard let serving, serving.ownsReporter else { return nil }
      serving.reporter.stop()
      return serving.reporter
    }
    reports.awaitDelivery(Self.callbackPatience)
    reporter?.join(0)
  }

  /// Whether the fault threads are to end.
  var isStopping: Bool { stopRequested.load(ordering: .acquiring) }

  private func requestStop() {
    stopRequested.store(true, ordering: .releasing)
    stopSign.signal()
  }

  var wasReleased: Bool { isReleased.load(ordering: .acquiring) }

  /// Wakes all waiters; those whose page is not there fault again.
  func wakeAll() {
    for region in regions { memory.wake(region.host) }
  }

  // MARK: - What others see

  /// What has been done so far, over all threads.
  public var statistics: PagerStatistics {
    var total = PagerStatistics()
    for slot in counters { slot.counters.add(to: &total) }
    return total
  }

  /// The pages that have no right content, the first 64 of them.
  public var failures: [PageFailure] { state.withLock { $0.failures } }

  /// Whether the guest's process is gone or the session failed.
  public var hasEnded: Bool { state.withLock { $0.end != nil } }

  /// Whether the guest's process still has the memory; `false` as soon as it exits, which a
  /// session that is idle learns a moment later.
  public var hasGuest: Bool { !hasEnded && memory.userfaultfd.hasAddressSpace }

  var endError: PagerError? {
    switch state.withLock({ $0.end }) {
    case nil: nil
    case .processGone: PagerError(.ended, "the guest's process is gone")
    case .failed(let errno): PagerError(.ended, "the userfaultfd failed", errno: errno)
    case .abandoned:
      PagerError(.ended, "one of its fault threads does not come back from the kernel")
    case .protectionFault:
      PagerError(
        .ended,
        "the memory is write-protected, and such faults are not served: register it "
          + "without WP, or with WP_ASYNC")
    case .movedTooOften:
      PagerError(
        .ended, "mremap(2) cut the memory into more than \(WatchedMemory.pieceLimit) pieces")
    }
  }

  /// After an error was reported and nothing to read: poll(2) says so of a userfaultfd that waits
  /// (fs/userfaultfd.c, userfaultfd_poll), and another process that has the open file too can make
  /// it wait. Whether it does not any more; if it is no such thing, the session has ended.
  func makeNonBlocking() -> Bool {
    do throws(Errno) {
      try memory.userfaultfd.descriptor.setNonBlocking(true)
      return true
    } catch {
      end(.failed(error))
      return false
    }
  }

  /// Notes that memory was moved. The caller holds the gate alone.
  func move(from: HostAddress, to: HostAddress, length: Int) {
    guard let cuts = memory.move(from: from, to: to, length: length, regions: regions) else {
      return end(.movedTooOften)
    }
    // The kernel moves whole pages only; what was cut apart is no page any more.
    for cut in cuts {
      guard let region = region(at: cut),
        !region.pageSize.divides(region.host.start.distance(to: cut))
      else { continue }
      region.states.take(.unmap, region.page(of: cut))
    }
  }

  func end(_ reason: End) {
    let isFirst = state.withLock { state in
      defer { state.end = state.end ?? reason }
      return state.end == nil
    }
    requestStop()
    if isFirst, let error = endError { reports.postLast(.end(error)) }
  }

  /// Those that the guest's process forked, while the session serves; `nil` where forks are no
  /// events.
  var children: ForkedChildren? { state.withLock { $0.children } }

  private func endChildren() {
    let children = state.withLock { state in
      defer { state.children = nil }
      return state.children
    }
    children?.finish(patience: Self.childPatience)
  }

  func record(_ failure: PageFailure) {
    state.withLock { state in
      state.failureCount += 1
      if state.failures.count < Self.failureLimit { state.failures.append(failure) }
    }
    if options.onFailure != nil { reports.post(.failure(failure)) }
  }

  /// The pidfd's number, or -1.
  var processDescriptor: CInt { process.rawValue }

  /// The region that holds an address.
  func region(at address: HostAddress) -> PagedRegion? { numberedRegion(at: address)?.region }

  /// The region that holds an address, and its number.
  func numberedRegion(at address: HostAddress) -> (number: Int, region: PagedRegion)? {
    let number = firstRegion(endingAfter: address)
    guard number < regions.count, regions[number].host.contains(address) else { return nil }
    return (number, regions[number])
  }

  /// The number of the first region that ends after an address: binary search, for a VMM can have
  /// hundreds.
  func firstRegion(endingAfter address: HostAddress) -> Int {
    var (low, high) = (0, regions.count)
    while low < high {
      let middle = (low + high) / 2
      if regions[middle].host.end <= address { low = middle + 1 } else { high = middle }
    }
    return low
  }
}
