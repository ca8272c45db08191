// SPDX-License-Identifier: Apache-2.0

internal import GuestMemory
internal import LinuxSystem
internal import SystemPackage
internal import Userfault

/// What became of a fault.
enum FaultOutcome {
  /// Its waiters are awake, or another thread will wake them.
  case resolved
  /// An event must be read first (EAGAIN).
  case retry
  /// The source does not have the page at hand, there is no memory for it, or a lock is needed that
  /// the guest may hold. It stays claimed: whoever gets this has it settled by a thread that may wait.
  case deferred
  /// The page is not claimed, and may be there or not: its waiters are awake, and those that do not
  /// find it fault again. Whoever gets this sees to it that they do so at a bounded pace.
  case doubtful
  /// The memory there is not the session's.
  case foreign
  /// The session is over.
  case ended
}

/// What a page is to become.
enum PageFill {
  /// The bytes in the bench.
  case staged
  /// Zeros.
  case zero
  /// The page cache has it: map it.
  case cached
}

// The path of one fault. No allocation, no Foundation, no task; the only lock is the
// session's own gate.
extension PagerSession {
  /// Resolves one fault.
  ///
  /// - Parameter window: pages from that one on that the guest will probably touch next.
  func resolve(
    _ fault: PageFault, window: Int = 1, bench: borrowing Workbench,
    counters: borrowing WorkerCounters
  ) -> FaultOutcome {
    guard let region = region(at: fault.address) else { return .foreign }
    let page = region.page(of: fault.address)
    while true {
      switch region.states.load(page) {
      case .absent:
        guard region.states.claim(from: page, limit: 1) == 1 else { continue }
        recorder.note(region.range(of: page).start)
        return fetchAndInstall(page, window: window, region, bench, counters)
      case .filling:
        counters.coalescedFaults.add()
        return .resolved
      case .present where region.share != nil:
        // The kernel unmapped a clean page, or the cache took it out. What the clone had written
        // is no page of the cache, and stays.
        guard region.states.take(.reclaim, page) else { continue }
        return fetchAndInstall(page, window: 1, region, bench, counters)
      case .present:
        // In the page cache but not mapped, or dropped without an event (MADV_DONTNEED
        // where remove events were not negotiated, PUNCH_HOLE): then it reads as zero.
        let fill: PageFill = fault.flags.contains(.minor) ? .cached : .zero
        return install(fill, page, region, bench, counters, expecting: .present)
      case .removed:
        // A clone's page cache has the image's content, which does not come back.
        return install(
          zeroOrCached(fault, region), page, region, bench, counters, expecting: .removed)
      case .zero:
        return install(
          zeroOrCached(fault, region), page, region, bench, counters, expecting: .zero)
      case .poisoned: return poisonAgain(page, region)
      case .withheld:
        stopGuestIfSo()
        return .resolved
      case .unmapped: return .foreign
      }
    }
  }

  /// What a page gets that is zero for this session: a minor fault says that it was written
  /// since, through another mapping of its memory. A clone's page cache is no memory of its own.
  private func zeroOrCached(_ fault: PageFault, _ region: PagedRegion) -> PageFill {
    fault.flags.contains(.minor) && region.share == nil ? .cached : .zero
  }

  /// Notes what a remove event covers. The caller holds the gate alone.
  func remove(_ range: HostRange) {
    for range in memory.originals(of: range) { forEachRegion(in: range) { $0.remove(range) } }
  }

  /// Notes what an unmap event covers. The caller holds the gate alone.
  func unmap(_ range: HostRange) {
    for range in memory.originals(of: range) { forEachRegion(in: range) { $0.unmap(range) } }
  }

  func forEachRegion(in range: HostRange, _ body: (PagedRegion) -> Void) {
    var index = firstRegion(endingAfter: range.start)
    while index < regions.count, regions[index].host.start < range.end {
      body(regions[index])
      index += 1
    }
  }

  // MARK: - Content

  func fetchAndInstall(
    _ page: Int, _ region: PagedRegion, _ bench: borrowing Workbench,
    _ counters: borrowing WorkerCounters
  ) -> FaultOutcome {
    if let share = region.share {
      switch self.share(
        page, limit: 1, isClaimed: true, region, share, bench, counters)
      {
      case .settled(1...): return .resolved
      case .deferred: return .deferred
      case .failed(let error):
        return fail(page, region, counters, expecting: .filling, reason: error.description)
      case .settled: break
      // An event stands before it, or it has to be a page of its own: below, by a copy.
      }
    }
    do {
      guard let fill = try fetchPatiently(page, region, bench) else { return .deferred }
      return install(fill, page, region, bench, counters, expecting: .filling)
    } catch {
      return fail(page, region, counters, expecting: .filling, reason: error.description)
    }
  }

  /// Reads one page of the region, and asks again when the source is out of reach, if this
  /// thread may wait. `nil` when it may not.
  func fetchPatiently(
    _ page: Int, _ region: PagedRegion, _ bench: borrowing Workbench
  ) throws(PageSourceError) -> PageFill? {
    let deadline = MonotonicClock.nanoseconds &+ sourceTimeout
    while true {
      do {
        return try fetch(page, region, bench)
      } catch {
        guard error.mayRecover else { throw error }
        guard bench.waits else { return nil }
        guard MonotonicClock.nanoseconds < deadline, region.states.load(page) == .filling,
          !hasEnded
        else { throw error }
        Pause.microseconds(20_000)
      }
    }
  }

  /// Reads one page of the region into the bench; `nil` where it is not at hand and this thread
  /// may not wait.
  func fetch(
    _ page: Int, _ region: PagedRegion, _ bench: borrowing Workbench
  ) throws(PageSourceError) -> PageFill? {
    let size = region.pageSize.bytes
    let start = region.sourceOffset + page * size
    var done = 0
    var anyData = false
    while done < size {
      // SAFETY: the bench is as long as the largest page.
      guard
        let run = try unsafe read(
          region, offset: start + done, length: size - done, into: bench.pointer + done,
          waits: bench.waits)
      else { return nil }
      if run.isZero {
        // Only a page that also has data needs its zeros written out.
        if run.length < size {
          unsafe (bench.pointer + done).initializeMemory(
            as: UInt8.self, repeating: 0, count: run.length)
        }
      } else {
        anyData = true
      }
      done += run.length
    }
    return anyData ? .staged : .zero
  }
}
