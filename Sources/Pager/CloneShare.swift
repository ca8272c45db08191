// SPDX-License-Identifier: Apache-2.0

internal import GuestMemory
internal import LinuxSystem
internal import Synchronization
internal import SystemPackage
internal import Userfault

/// The share of one clone's region in a cache of clean pages: which pages of the cache it has.
@safe
final class CloneShare: @unchecked Sendable {
  // SAFETY: all access to the bits is atomic; the mapping lives as long as the share.
  let cache: SharedPageCache
  private let storage: Mapping
  private let bits: UnsafeMutablePointer<Atomic<UInt8>>

  init(_ cache: SharedPageCache) throws(Errno) {
    self.cache = cache
    storage = try Mapping(anonymous: (cache.pageCount / 8 + 4096) & ~4095)
    // SAFETY: Atomic<UInt8> has the layout of UInt8; anonymous memory is zero.
    unsafe bits = storage.pointer.assumingMemoryBound(to: Atomic<UInt8>.self)
  }

  deinit { release(0..<cache.pageCount) }

  /// Notes that the clone has pages whose share it took.
  func note(_ pages: Range<Int>) {
    eachByte(of: pages) { byte, mask in
      let before = unsafe bits[byte].bitwiseOr(mask, ordering: .acquiringAndReleasing).oldValue
      // It had these pages before, and has one share of each.
      releaseShares(byte, before & mask)
    }
  }

  /// Gives back what the clone has of some pages.
  func release(_ pages: Range<Int>) {
    eachByte(of: pages) { byte, mask in
      guard unsafe bits[byte].load(ordering: .relaxed) & mask != 0 else { return }
      let before = unsafe bits[byte].bitwiseAnd(~mask, ordering: .acquiringAndReleasing).oldValue
      releaseShares(byte, before & mask)
    }
  }

  /// The bytes of the bits of some pages, and which bits of each.
  @inline(__always)
  private func eachByte(of pages: Range<Int>, _ body: (Int, UInt8) -> Void) {
    var page = pages.lowerBound
    while page < pages.upperBound {
      let count = min(8 - page % 8, pages.upperBound - page)
      body(page / 8, UInt8(truncatingIfNeeded: (1 << count - 1) << (page % 8)))
      page += count
    }
  }

  private func releaseShares(_ byte: Int, _ mask: UInt8) {
    var rest = mask
    while rest != 0 {
      let page = byte * 8 + rest.trailingZeroBitCount
      cache.release(page..<page + 1)
      rest &= rest - 1
    }
  }
}

/// What became of pages of a clone.
enum ShareOutcome {
  /// So many are there, from the first on; none: an event, or another thread, was in the way.
  case settled(Int)
  /// The source does not have the page at hand, or another clone is about to bring it, and this
  /// thread may not wait.
  case deferred
  /// The source has no right content.
  case failed(PageSourceError)
}

// Pages of clones: from the cache, which is filled first where it lacks them. No lock but the
// session's gate is taken, and nothing is allocated.
extension PagerSession {
  /// Bytes of clean pages that are mapped in one step.
  static var sharedLength: Int { 1 << 20 }

  /// Brings a page that this thread has claimed, and those after it that are to be had with it.
  ///
  /// - Parameters:
  ///   - limit: pages from that one on, at least 1.
  ///   - isClaimed: all of them are claimed; otherwise the first, and the others are claimed when
  ///     their content is there.
  func share(
    _ first: Int, limit: Int, isClaimed: Bool, fillsZeros: Bool = true, _ region: PagedRegion,
    _ share: CloneShare, _ bench: borrowing Workbench, _ counters: borrowing WorkerCounters
  ) -> ShareOutcome {
    let cache = share.cache
    var patience = 200
    while true {
      let held = cache.hold(from: first, limit: limit)
      if held > 0 {
        let count =
          isClaimed ? held : 1 + region.states.claim(from: first + 1, limit: held - 1)
        let done = continueHeld(first..<first + count, region, share, counters)
        cache.release(first + done..<first + held)
        if !isClaimed, count > max(done, 1) {
          giveBack(region, first + max(done, 1)..<first + count)
        }
        return .settled(done)
      }
      let room = max(1, min(bench.length, Self.pieceLength) / region.pageSize.bytes)
      let claimed = cache.claim(from: first, limit: min(limit, room))
      if claimed > 0 {
        return bring(
          first, count: claimed, isClaimed: isClaimed, fillsZeros: fillsZeros, region, share, bench,
          counters)
      }
      // Another clone brings it: mostly a matter of microseconds.
      guard cache.isBeingFilled(first) else { continue }
      patience -= 1
      if patience > 0 {
        Pause.yield()
      } else if bench.waits, !hasEnded {
        Pause.microseconds(100)
      } else {
        return .deferred
      }
    }
  }

  /// Fills pages of the cache that this thread has claimed there, then the clone's.
  private func bring(
    _ first: Int, count: Int, isClaimed: Bool, fillsZeros: Bool, _ region: PagedRegion,
    _ share: CloneShare, _ bench: borrowing Workbench, _ counters: borrowing WorkerCounters
  ) -> ShareOutcome {
    let cache = share.cache
    let run: FetchedRun
    do {
      run = try fetchRun(first, limit: count, region, bench, insists: count > 1)
      if run.count == 0 {
        // It ends inside of a huge page, or is not at hand.
        guard let fill = try fetchPatiently(first, region, bench) else {
          cache.giveBack(first..<first + count)
          return .deferred
        }
        cache.giveBack(first + 1..<first + count)
        return install(
          FetchedRun(isZero: fill == .zero, count: 1), first, isClaimed: true,
          fillsZeros: fillsZeros, region, share, bench, counters)
      }
    } catch {
      cache.giveBack(first..<first + count)
      // Asked again by whoever may wait.
      return error.mayRecover && !bench.waits ? .deferred : .failed(error)
    }
    cache.giveBack(first + run.count..<first + count)
    return install(
      run, first, isClaimed: isClaimed, fillsZeros: fillsZeros, region, share, bench, counters)
  }

  /// Puts a run that is in the bench into the cache and the clone. The pages are claimed there;
  /// here all of them are, or the first.
  private func install(
    _ run: FetchedRun, _ first: Int, isClaimed: Bool, fillsZeros: Bool, _ region: PagedRegion,
    _ share: CloneShare, _ bench: borrowing Workbench, _ counters: borrowing WorkerCounters
  ) -> ShareOutcome {
    let cache = share.cache
    let pages = first..<first + run.count
    guard !run.isZero else {
      // Zeros take no room in the cache.
      cache.giveBack(pages)
      if !fillsZeros {
        leaveZero(region, pages)
        return .settled(run.count)
      }
      return installPrivately(run, first, isClaimed: isClaimed, region, bench, counters)
    }
    // SAFETY: the bench holds the run.
    guard unsafe cache.fill(pages, from: bench.pointer) else {
      return installPrivately(run, first, isClaimed: isClaimed, region, bench, counters)
    }
    let held = cache.hold(from: first, limit: run.count)
    let count = isClaimed ? held : 1 + region.states.claim(from: first + 1, limit: max(0, held - 1))
    guard held > 0 else { return .settled(0) }
    let done = continueHeld(first..<first + count, region, share, counters)
    cache.release(first + done..<first + held)
    if !isClaimed, count > max(done, 1) { giveBack(region, first + max(done, 1)..<first + count) }
    return .settled(done)
  }

  /// Pages that are this clone's alone: zeros, and what finds no room in the cache.
  private func installPrivately(
    _ run: FetchedRun, _ first: Int, isClaimed: Bool, _ region: PagedRegion,
    _ bench: borrowing Workbench, _ counters: borrowing WorkerCounters
  ) -> ShareOutcome {
    let count =
      isClaimed ? run.count : 1 + region.states.claim(from: first + 1, limit: run.count - 1)
    if run.isZero, region.pageSize != .size4KiB {
      // hugetlbfs has no ZEROPAGE: one page at a time, by the way of a single page.
      if !isClaimed { giveBack(region, first + 1..<first + count) }
      return .settled(0)
    }
    let done = installRun(
      first, FetchedRun(isZero: run.isZero, count: count), region, bench, counters)
    if !isClaimed, count > max(done, 1) { giveBack(region, first + max(done, 1)..<first + count) }
    return .settled(done)
  }

  /// Maps pages of the cache that this thread holds a share of, as far as they are still wanted.
  ///
  /// - Returns: how many; their shares are the clone's from here on.
  private func continueHeld(
    _ pages: Range<Int>, _ region: PagedRegion, _ share: CloneShare,
    _ counters: borrowing WorkerCounters
  ) -> Int {
    gate.read {
      guard !wasReleased else { return 0 }
      var count = 0
      while count < pages.count, region.states.load(pages.lowerBound + count) == .filling {
        count += 1
      }
      guard count > 0 else { return 0 }
      let resolution = memory.continue(region.range(of: pages.lowerBound, count: count))
      var done = resolution.bytesDone / region.pageSize.bytes
      if done == 0, resolution.obstacle == .alreadyPresent {
        // It is mapped: this was one of several faults that were raised at the same time.
        memory.wake(region.range(of: pages.lowerBound))
        counters.alreadyPresent.add()
        done = 1
      }
      let mapped = pages.lowerBound..<pages.lowerBound + done
      share.note(mapped)
      region.states.take(.fill, mapped)
      counters.continuedPages.add(UInt64(done))
      return done
    }
  }
}
