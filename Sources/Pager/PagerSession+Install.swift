// SPDX-License-Identifier: Apache-2.0

internal import GuestMemory
internal import LinuxSystem
internal import Synchronization
internal import SystemPackage
internal import Userfault

// What is put in the place of a page, by one of the kernel's calls, and what their answers prove.
extension PagerSession {
  /// How long a resolution that an event stands before is tried again before the next event is
  /// read: the one that was read is over when the thread that gave memory back has run, and each
  /// that is read lets the next one begin. 100 µs.
  private static var eventPatience: UInt64 { 100_000 }

  /// Between two attempts to get memory for a page, in microseconds.
  static var shortagePace: UInt32 { 20_000 }

  /// Resolves a page and records its new state, if its state is still the expected one;
  /// if an event changed it meanwhile, what the event said holds.
  func install(
    _ fill: PageFill, _ page: Int, _ region: PagedRegion, _ bench: borrowing Workbench,
    _ counters: borrowing WorkerCounters, expecting expected: PageState
  ) -> FaultOutcome {
    var eventDeadline: UInt64 = 0
    while true {
      let finding = gate.read {
        attempt(fill, page, region, bench, counters, expecting: expected)
      }
      switch finding {
      case nil, .done, .there, .unregistered:
        return .resolved
      case .changing:
        let now = MonotonicClock.nanoseconds
        if eventDeadline == 0 { eventDeadline = now &+ Self.eventPatience }
        if now < eventDeadline {
          Pause.yield()
          continue
        }
        // The fault is tried again from the start.
        region.states.take(.giveBack, page)
        return .retry
      case .noGuest:
        end(.processGone)
        return .ended
      case .uncached where fill == .cached:
        // The page left the page cache again (a hole was punched): it is zero now.
        return install(.zero, page, region, bench, counters, expecting: expected)
      case .uncached:
        return fail(page, region, counters, expecting: expected, reason: "\(Errno.badAddress)")
      case .impossible(.wouldBlock):
        // A lock that the guest may hold is for a thread that may be held up.
        return .deferred
      case .impossible(let errno):
        return fail(page, region, counters, expecting: expected, reason: "\(errno)")
      case .shortage(let errno):
        // Of a page that was there before it proves nothing at all, mostly it is there.
        if expected == .filling, isShortForTooLong {
          return fail(
            page, region, counters, expecting: expected,
            reason: Finding.reason(errno, region.pageSize))
        }
        guard expected == .filling else { return .doubtful }
        // What is there all the same is found by whoever looks again.
        memory.wake(region.range(of: page))
        guard bench.waits else { return .deferred }
        guard mayWaitForMemory else {
          giveBack(region, page..<page + 1)
          return .resolved
        }
        Pause.microseconds(Self.shortagePace)
      }
    }
  }

  /// Whether pages could not be had for want of memory for as long as a page may take.
  private var isShortForTooLong: Bool {
    let now = MonotonicClock.nanoseconds
    let last = shortLast.exchange(now, ordering: .relaxed)
    // One that ended, and was not seen to end because no page was wanted.
    if now &- last > Self.shortageMemory { shortSince.store(now, ordering: .relaxed) }
    let (_, since) = shortSince.compareExchange(expected: 0, desired: now, ordering: .relaxed)
    return since != 0 && now > since && now - since > sourceTimeout
  }

  private static var shortageMemory: UInt64 { 1_000_000_000 }

  /// Notes that pages could be had.
  func noteRoom() {
    if shortSince.load(ordering: .relaxed) != 0 { shortSince.store(0, ordering: .relaxed) }
  }

  /// Whether a thread that waits for memory is to go on with that.
  private var mayWaitForMemory: Bool { !isStopping && !hasEnded && !background.isStopping }

  /// One attempt. The caller holds the gate.
  ///
  /// - Returns: `nil` where an event settled it.
  private func attempt(
    _ fill: PageFill, _ page: Int, _ region: PagedRegion, _ bench: borrowing Workbench,
    _ counters: borrowing WorkerCounters, expecting expected: PageState
  ) -> Finding? {
    guard !wasReleased else { return nil }
    let current = region.states.load(page)
    let range = region.range(of: page)
    var fill = fill
    if current != expected {
      // Between the claim and now: removed → zeros; unmapped → whoever slept on the
      // page looks again, and finds no mapping.
      guard current == .removed else {
        memory.wake(range)
        return nil
      }
      fill = .zero
    }
    let (resolution, call) = apply(fill, range, page, region, bench)
    let finding = Finding(resolution, of: call, on: region.pageSize)
    switch finding {
    case .done:
      count(call, fill, counters)
      settle(page, region, current)
      noteRoom()
    case .there:
      counters.alreadyPresent.add()
      memory.wake(range)
      settle(page, region, current)
    case .shortage: counters.shortages.add()
    case .unregistered:
      region.states.take(.unmap, page)
      memory.wake(range)
    default: break
    }
    return finding
  }

  /// Records that a page is there. Taking a page out of a cache also takes zeros from a clone that
  /// has them in its place: that they are there for good, and not the image's content, is kept in
  /// the state.
  private func settle(_ page: Int, _ region: PagedRegion, _ current: PageState) {
    guard current != .removed || region.share == nil else { return }
    region.states.take(.fill, page)
  }

  /// The calls of one resolution, and which one decided. The caller holds the gate.
  private func apply(
    _ fill: PageFill, _ range: HostRange, _ page: Int, _ region: PagedRegion,
    _ bench: borrowing Workbench
  ) -> (Resolution, Finding.Call) {
    switch fill {
    case .cached: return (memory.continue(range), .continue)
    case .staged:
      // SAFETY: the bench holds the whole page, which was just fetched.
      unsafe region.holes?.clear(page..<page + 1, in: bench.pointer)
      return unsafe fillRange(from: bench.pointer, range, page, region, waits: bench.waits)
    case .zero where region.pageSize == .size4KiB:
      let resolution = memory.zeropage(range)
      guard resolution.obstacle == .alreadyPresent, mayHoldOldContent(page, region) else {
        return (resolution, .zeropage)
      }
    case .zero: break
    }
    // hugetlbfs has no ZEROPAGE, and what is in the page cache already has to be written over.
    // SAFETY: the bench is as long as the largest page.
    unsafe bench.pointer.initializeMemory(as: UInt8.self, repeating: 0, count: range.length)
    return unsafe mayHoldOldContent(page, region)
      ? fillRange(from: bench.pointer, range, page, region, waits: bench.waits)
      : (memory.copy(from: bench.pointer, to: range), .copy)
  }

  /// Whether what the page cache has at a page is not the guest's yet.
  private func mayHoldOldContent(_ page: Int, _ region: PagedRegion) -> Bool {
    region.mode == .minor && region.states.load(page) == .filling
  }

  /// Fills whole pages from a buffer and maps them: by UFFDIO_COPY, or through the page
  /// cache and UFFDIO_CONTINUE. The caller holds the gate.
  ///
  /// Another process's page cache is filled by UFFDIO_COPY too, where it has no such page yet.
  /// Writing over one that it has takes a lock that the process may hold: `wouldBlock` for a thread
  /// that may not wait.
  @unsafe
  func fillRange(
    from bytes: UnsafeRawPointer, _ range: HostRange, _ page: Int, _ region: PagedRegion,
    waits: Bool
  ) -> (Resolution, Finding.Call) {
    switch region.cache {
    case .none: return unsafe (memory.copy(from: bytes, to: range), .copy)
    case .some(let cache):
      if cache.isHanded {
        let resolution = unsafe memory.copy(from: bytes, to: range)
        guard resolution.obstacle == .alreadyPresent else { return (resolution, .copy) }
        guard waits else {
          return (Resolution(bytesDone: 0, obstacle: .failed(.wouldBlock)), .write)
        }
      }
      do throws(Errno) {
        try unsafe cache.write(
          UnsafeRawBufferPointer(start: bytes, count: range.length),
          at: page * region.pageSize.bytes)
      } catch {
        return (Resolution(bytesDone: 0, obstacle: .failed(error)), .write)
      }
      return (memory.continue(range), .continue)
    }
  }

  private func count(
    _ call: Finding.Call, _ fill: PageFill, _ counters: borrowing WorkerCounters
  ) {
    switch (fill, call) {
    case (.zero, _): counters.zeroPages.add()
    case (_, .continue): counters.continuedPages.add()
    default: counters.copiedPages.add()
    }
  }

  // MARK: - Nothing in its place

  /// Leaves claimed pages of zeros as they are: from here on they are known to be zero by
  /// themselves. What a memory file has there from before is taken out; where that fails they are
  /// given back. Whoever faulted on them meanwhile faults anew.
  ///
  /// - Returns: whether they are settled.
  @discardableResult
  func leaveZero(_ region: PagedRegion, _ pages: Range<Int>) -> Bool {
    guard !pages.isEmpty else { return true }
    let isDone = gate.read {
      // What an event has changed meanwhile may be the guest's already.
      guard !wasReleased, pages.allSatisfy({ region.states.load($0) == .filling }) else {
        return false
      }
      do throws(Errno) {
        if region.mode == .minor { try discardCached(region, pages) }
      } catch {
        return false
      }
      region.states.take(.leaveZero, pages)
      return true
    }
    guard isDone else {
      giveBack(region, pages)
      return false
    }
    memory.wake(region.range(of: pages.lowerBound, count: pages.count))
    return true
  }

  /// What a vCPU finds in a guest_memfd is the machine's, which began with an empty one.
  private func discardCached(_ region: PagedRegion, _ pages: Range<Int>) throws(Errno) {
    guard region.populator == nil else { return }
    switch region.cache {
    case .none: break
    case .some(let cache):
      let size = region.pageSize.bytes
      try cache.discard(offset: pages.lowerBound * size, length: pages.count * size)
    }
  }

  /// Claims that were not used: the pages are absent again, and whoever faulted on them
  /// meanwhile faults anew.
  func giveBack(_ region: PagedRegion, _ pages: Range<Int>) {
    guard !pages.isEmpty else { return }
    region.states.take(.giveBack, pages)
    guard !wasReleased else { return }
    memory.wake(region.range(of: pages.lowerBound, count: pages.count))
  }
}
