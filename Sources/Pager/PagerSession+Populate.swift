// SPDX-License-Identifier: Apache-2.0

internal import GuestMemory
internal import LinuxSystem
internal import Synchronization
internal import SystemPackage
internal import Userfault

// Filling ahead of the guest, or behind it: in bulk, through the same states and the
// same gate as the faults, which therefore go on meanwhile.
extension PagerSession {
  /// What a thread takes at a time.
  private static var chunkLength: Int { 4 << 20 }

  /// Fills every absent page that has data; returns when all of them are there.
  ///
  /// Zero pages stay as they are: a touch resolves them, and after `release` they read as
  /// zero by themselves. Pages without right content are poisoned and listed in
  /// `failures`. While a guest runs, the session must be started.
  ///
  /// Throws `.damagedPages` after filling the others, and `.stopped` where the session was stopped
  /// meanwhile.
  ///
  /// - Parameter progress: called from the filling threads with bytes done and bytes in
  ///   all.
  public func populate(
    progress: (@Sendable (_ done: Int, _ total: Int) -> Void)? = nil
  ) throws(PagerError) {
    let failed = statistics.failedPages
    let plan = ReplayPlan(all: regions) { max(1, Self.chunkLength / $0.pageSize.bytes) }
    try fill(plan, isReplay: false, progress: progress)
    // What another thread had claimed, and may give back.
    while !isFilled {
      guard !isStopping else {
        throw PagerError(.stopped, "the session was stopped before all pages were there")
      }
      Pause.microseconds(1000)
      try fill(plan, isReplay: false, progress: nil)
    }
    try throwIfDamaged(since: failed)
  }

  /// Throws where pages turned out to have no right content.
  func throwIfDamaged(since failed: UInt64) throws(PagerError) {
    let damaged = statistics.failedPages - failed
    guard damaged > 0 else { return }
    throw PagerError(
      .damagedPages,
      "\(damaged) pages have no right content; they were "
        + (canPoison ? "poisoned" : "left out, and a touch waits"))
  }

  /// Fills the windows of a plan in their order with several threads, each taking the next one.
  ///
  /// - Parameter isReplay: also resolves pages of zeros, and ends when the session is stopped.
  func fill(
    _ plan: ReplayPlan, isReplay: Bool, progress: (@Sendable (Int, Int) -> Void)?
  ) throws(PagerError) {
    isReplaying.store(isReplay, ordering: .relaxed)
    defer { isReplaying.store(false, ordering: .relaxed) }
    let total = plan.bytes
    let tally = PopulateTally()
    var threads: [ThreadBox] = []
    do throws(Errno) {
      for index in 0..<options.populateThreads {
        let slot = counters[options.faultThreads + index]
        let bench = try SendableBench(length: benchLength)
        let thread = try NamedThread(name: "populate\(index)") {
          while !self.hasEnded, !(isReplay && self.isStopping),
            let window = tally.next(of: plan.windowCount).map(plan.window)
          {
            self.populate(window, of: plan, bench.buffer, slot.counters, isReplay: isReplay)
            progress?(tally.finish(plan.bytes(of: window)), total)
          }
        }
        threads.append(ThreadBox(thread))
      }
    } catch {
      for thread in threads { thread.join() }
      throw PagerError(.resources, "no memory or thread for filling", errno: error)
    }
    for thread in threads { thread.join() }
    // Where nobody serves, nobody else tells of what was found.
    reports.deliverHere()
    if let error = endError { throw error }
  }

  /// Fills the wanted pages of a window.
  func populate(
    _ window: ReplayPlan.Window, of plan: ReplayPlan, _ bench: borrowing Workbench,
    _ counters: borrowing WorkerCounters, isReplay: Bool
  ) {
    var page = window.pages.lowerBound
    while let pages = plan.next(in: window, from: page) {
      populate(regions[window.region], pages, bench, counters, isReplay: isReplay)
      page = pages.upperBound
    }
  }

  private func populate(
    _ region: PagedRegion, _ pages: Range<Int>, _ bench: borrowing Workbench,
    _ counters: borrowing WorkerCounters, isReplay: Bool
  ) {
    let piece = pagesInStep(region)
    var page = pages.lowerBound
    // A source may be slow, and a piece have a thousand pages: nobody needs them then.
    while page < pages.upperBound, !hasEnded {
      let limit = min(piece, pages.upperBound - page)
      var claimed = region.states.claim(from: page, limit: limit)
      if claimed == 0 {
        page = region.states.first(.absent, in: page..<pages.upperBound) ?? pages.upperBound
        continue
      }
      while claimed > 0 {
        guard !hasEnded else {
          giveBack(region, page..<page + claimed)
          return
        }
        let done = populateRun(
          region, page, claimed, bench, counters, isReplay: isReplay)
        page += done
        claimed -= done
      }
    }
  }

  /// Fills the first run of claimed pages; returns how many pages are settled.
  private func populateRun(
    _ region: PagedRegion, _ first: Int, _ claimed: Int, _ bench: borrowing Workbench,
    _ counters: borrowing WorkerCounters, isReplay: Bool
  ) -> Int {
    if let share = region.share {
      let outcome = self.share(
        first, limit: claimed, isClaimed: true, fillsZeros: isReplay, region, share, bench,
        counters)
      if case .settled(let count) = outcome, count > 0 {
        counters.populatedPages.add(UInt64(count))
        return count
      }
    }
    // A damaged page, and a run that ends inside a page (hugetlbfs), go page by page.
    if region.share == nil,
      let run = try? fetchRun(
        first, limit: claimed, region, bench, insists: true,
        zeros: isReplay ? Self.zerosWithData : 0),
      run.count > 0
    {
      // hugetlbfs has no ZEROPAGE: its pages of zeros come by themselves.
      if run.isZero, !isReplay || region.pageSize != .size4KiB {
        leaveZero(region, first..<(first + run.count))
        return run.count
      }
      let installed = installRun(first, run, region, bench, counters)
      counters.populatedPages.add(UInt64(installed))
      if installed > 0 { return installed }
    }
    settleClaimed(first, window: 1, region, bench, counters)
    if region.states.load(first) == .present { counters.populatedPages.add() }
    return 1
  }
}

/// What the threads of one `populate` share.
private final class PopulateTally: Sendable {
  private let nextPiece = Atomic<Int>(0)
  private let bytesDone = Atomic<Int>(0)

  func next(of count: Int) -> Int? {
    let index = nextPiece.wrappingAdd(1, ordering: .relaxed).oldValue
    return index < count ? index : nil
  }

  func finish(_ bytes: Int) -> Int {
    bytesDone.wrappingAdd(bytes, ordering: .relaxed).newValue
  }
}
