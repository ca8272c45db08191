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
  /// The source does not have the page at hand. It stays claimed: whoever gets this has it read
  /// by a thread that may wait.
  case deferred
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
  /// An error on touch.
  case poison
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
    guard let region = region(at: fault.address) else {
      return refuse(fault, counters)
    }
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
        guard region.states.exchange(page, from: .present, to: .filling) else { continue }
        return fetchAndInstall(page, window: 1, region, bench, counters)
      case .present:
        // In the page cache but not mapped, or dropped without an event (MADV_DONTNEED
        // where remove events were not negotiated, PUNCH_HOLE): then it reads as zero.
        let fill: PageFill = fault.flags.contains(.minor) ? .cached : .zero
        return install(fill, page, region, bench, counters, expecting: .present)
      case .removed:
        // A clone's page cache has the image's content, which does not come back.
        let fill: PageFill =
          fault.flags.contains(.minor) && region.share == nil ? .cached : .zero
        return install(fill, page, region, bench, counters, expecting: .removed)
      case .poisoned:
        guard canPoison else {
          stopGuestIfSo()
          return .resolved
        }
        return install(.poison, page, region, bench, counters, expecting: .poisoned)
      case .unmapped:
        memory.wake(region.range(of: page))
        return .resolved
      }
    }
  }

  /// Marks what a remove or unmap event covers. The caller holds the gate alone.
  func mark(_ range: HostRange, as state: PageState) {
    for range in memory.originals(of: range) {
      for region in regions {
        let pages = region.pages(in: range)
        region.states.fill(pages, with: state)
        region.share?.release(pages)
      }
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
        return fail(page, region, bench, counters, expecting: .filling, reason: error.description)
      case .settled: break
      // An event stands before it, or it has to be a page of its own: below, by a copy.
      }
    }
    do {
      guard let fill = try fetchPatiently(page, region, bench) else { return .deferred }
      return install(fill, page, region, bench, counters, expecting: .filling)
    } catch {
      return fail(page, region, bench, counters, expecting: .filling, reason: error.description)
    }
  }

  /// Reads one page of the region, and asks again when the source is out of reach, if this
  /// thread may wait. `nil` when it may not.
  func fetchPatiently(
    _ page: Int, _ region: PagedRegion, _ bench: borrowing Workbench
  ) throws(PageSourceError) -> PageFill? {
    let deadline = MonotonicClock.nanoseconds &+ options.sourceTimeout
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

  // MARK: - Resolution

  /// Resolves a page and records its new state, if its state is still the expected one;
  /// if an event changed it meanwhile, what the event said holds.
  func install(
    _ fill: PageFill, _ page: Int, _ region: PagedRegion, _ bench: borrowing Workbench,
    _ counters: borrowing WorkerCounters, expecting expected: PageState
  ) -> FaultOutcome {
    var attempts = 0
    while true {
      let resolution = gate.read { () -> Resolution? in
        let current = region.states.load(page)
        var fill = fill
        if current != expected {
          // Between the claim and now: removed → zeros; unmapped → whoever slept on the
          // page looks again, and finds no mapping.
          guard current == .removed else {
            memory.wake(region.range(of: page))
            return nil
          }
          fill = .zero
        }
        // Taking a page out of a cache also takes zeros from a clone that has them in its place:
        // that they are there for good, and not the image's content, is kept in the state.
        let settled: PageState =
          current == .removed && region.share != nil ? .removed : .present
        let range = region.range(of: page)
        let resolution = apply(fill, range, page, region, bench)
        switch resolution.obstacle {
        case nil:
          count(fill, region.mode, counters)
          if fill != .poison { region.states.store(page, settled) }
        case .alreadyPresent:
          counters.alreadyPresent.add()
          memory.wake(range)
          if fill != .poison { region.states.store(page, settled) }
        case .notRegistered:
          region.states.store(page, .unmapped)
          memory.wake(range)
        case .mappingChanging, .partial:
          // Give the claim back: the fault is tried again from the start.
          _ = region.states.exchange(page, from: .filling, to: .absent)
        case .processGone, .absent, .failed:
          break
        }
        return resolution
      }
      switch resolution?.obstacle {
      case nil, .alreadyPresent, .notRegistered:
        return .resolved
      case .mappingChanging, .partial:
        return .retry
      case .processGone:
        end(.processGone)
        return .ended
      case .absent where fill == .cached:
        // The page left the page cache again (a hole was punched): it is zero now.
        return install(.zero, page, region, bench, counters, expecting: expected)
      case .absent:
        return fail(
          page, region, bench, counters, expecting: expected, reason: "\(Errno.badAddress)")
      case .failed(let errno):
        // No memory now need not mean none in a moment; but not for ever.
        attempts += 1
        if errno == .noMemory, attempts < 100 {
          Pause.microseconds(10_000)
          continue
        }
        return fail(page, region, bench, counters, expecting: expected, reason: "\(errno)")
      }
    }
  }

  /// The ioctls of one resolution. The caller holds the gate.
  private func apply(
    _ fill: PageFill, _ range: HostRange, _ page: Int, _ region: PagedRegion,
    _ bench: borrowing Workbench
  ) -> Resolution {
    switch fill {
    case .staged:
      // SAFETY: the bench holds the whole page, which was just fetched.
      return unsafe fillRange(from: bench.pointer, range, page, region)
    case .zero:
      guard case .size4KiB = region.pageSize else {
        // hugetlbfs has no ZEROPAGE.
        unsafe bench.pointer.initializeMemory(
          as: UInt8.self, repeating: 0, count: range.length)
        return unsafe memory.copy(from: bench.pointer, to: range)
      }
      return memory.zeropage(range)
    case .cached:
      return memory.continue(range)
    case .poison:
      return memory.poison(range)
    }
  }

  /// Fills whole pages from a buffer and maps them: by UFFDIO_COPY, or through the page
  /// cache and UFFDIO_CONTINUE. The caller holds the gate.
  @unsafe func fillRange(
    from bytes: UnsafeRawPointer, _ range: HostRange, _ page: Int, _ region: PagedRegion
  ) -> Resolution {
    switch region.cache {
    case .none:
      return unsafe memory.copy(from: bytes, to: range)
    case .some(let cache):
      do throws(Errno) {
        try unsafe cache.write(
          UnsafeRawBufferPointer(start: bytes, count: range.length),
          at: page * region.pageSize.bytes)
      } catch {
        return Resolution(bytesDone: 0, obstacle: .failed(error))
      }
      return memory.continue(range)
    }
  }

  private func count(
    _ fill: PageFill, _ mode: ResolutionMode, _ counters: borrowing WorkerCounters
  ) {
    switch fill {
    case .staged: mode == .minor ? counters.continuedPages.add() : counters.copiedPages.add()
    case .zero: counters.zeroPages.add()
    case .cached: counters.continuedPages.add()
    case .poison: break
    }
  }

  // MARK: - No right content

  /// Tells the guest: the page is poisoned where the kernel can, else its waiters wait. In a
  /// session that has ended nobody is there to tell, and what was given up for that is no damage.
  func fail(
    _ page: Int, _ region: PagedRegion, _ bench: borrowing Workbench,
    _ counters: borrowing WorkerCounters, expecting expected: PageState, reason: String
  ) -> FaultOutcome {
    guard !hasEnded else {
      giveBack(region, page..<page + 1)
      return .ended
    }
    let state = gate.read {
      let state = region.states.load(page)
      if state == expected, state != .poisoned { region.states.store(page, .poisoned) }
      return state
    }
    switch state {
    case expected where state != .poisoned: break
    case .removed:
      // Given up while its content was being looked for: zeros are right.
      return install(.zero, page, region, bench, counters, expecting: .removed)
    default:
      // Unmapped; or already poisoned, and recorded then.
      memory.wake(region.range(of: page))
      return .resolved
    }
    counters.failedPages.add()
    record(
      PageFailure(
        guestAddress: region.guestAddress.advanced(by: page * region.pageSize.bytes),
        hostAddress: region.range(of: page).start,
        pageSize: region.pageSize, isPoisoned: canPoison, reason: reason))
    guard canPoison else {
      // Whoever waits for it faults again: it is the touch that ends the guest, not the damage.
      if options.onDamage == .stopVMM { memory.wake(region.range(of: page)) }
      return .resolved
    }
    return install(.poison, page, region, bench, counters, expecting: .poisoned)
  }

  /// A fault outside of all regions: the other side registered memory that it did not
  /// describe. There is no right content for it.
  ///
  /// - Parameter fault: with the present address.
  func refuse(_ fault: PageFault, _ counters: borrowing WorkerCounters) -> FaultOutcome {
    let page = HostRange(
      start: HostAddress(fault.address.rawValue & ~4095), length: PageSize.size4KiB.bytes)
    var poisoned = false
    // What is not registered any more was moved or unmapped since: whoever waits looks again.
    let probe = gate.read {
      canPoison
        ? memory.userfaultfd.poison(page)
        : memory.userfaultfd.hasAddressSpace
          ? Resolution(bytesDone: 0, obstacle: .absent)
          : Resolution(bytesDone: 0, obstacle: .processGone)
    }
    switch probe.obstacle {
    case .mappingChanging: return .retry
    case .notRegistered:
      try? memory.userfaultfd.wake(page)
      return .resolved
    case .processGone:
      end(.processGone)
      return .ended
    case nil: poisoned = true
    default: stopGuestIfSo()
    }
    counters.failedPages.add()
    record(
      PageFailure(
        guestAddress: GuestAddress(fault.address.rawValue), hostAddress: page.start,
        pageSize: .size4KiB,
        isPoisoned: poisoned, reason: "host address \(page.start) lies in no region"))
    return .resolved
  }
}
