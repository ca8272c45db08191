// SPDX-License-Identifier: Apache-2.0

internal import Glibc
internal import GuestMemory
internal import Synchronization
internal import SystemPackage

/// Sees to it that each page is copied as it was at the pause, by exactly one of two: the
/// thread that lets the guest write (`willWrite`), or one of those that go through memory
/// (`copy`).
///
/// One bit for each page of the backing decides. The tracker's thread sets it *before* it
/// copies, the others *after*:
///
///     tracker's thread: set the bit; if it was clear, copy; then the write happens
///     copying thread:   copy; set the bit; if it was clear, the copy is good
///
/// A copying thread that finds the bit clear knows that no write was let through while it
/// copied. One that finds it set throws its copy away: the page is in the pool. Nobody waits
/// for anybody.
///
/// Protection is lifted only from pages whose bit the lifting thread has set, and at the end
/// when no page is left and the tracker's thread is at none: lifting it from a page that is
/// just being copied would let a write in.
final class PreimageGuard: Sendable {
  let pool: PreimagePool
  private let layout: SnapshotLayout
  /// Bits of the first pages of the backing's pages.
  private let taken: AtomicPageSet
  private let isActive = Atomic(false)
  private let isInHook = Atomic(false)
  private let tracking = Mutex<WriteProtectTracking?>(nil)

  init(_ layout: SnapshotLayout, poolBytes: Int) throws(Errno) {
    self.layout = layout
    taken = try AtomicPageSet(pageCount: layout.pageCount)
    let batchBytes = PageBatch.capacity * 4096
    pool = try PreimagePool(batches: max(2, poolBytes / batchBytes))
  }

  /// The tracker that announces writes here, and that `copy` lifts protection with.
  func use(_ tracking: WriteProtectTracking) { self.tracking.withLock { $0 = tracking } }

  /// The pause's point in time: from here on writes are held up until their page is copied, and
  /// those that were announced before are announced again. What was written before is to be
  /// protected again after this, while the guest is paused.
  func begin() throws(SnapshotError) {
    isActive.store(true, ordering: .sequentiallyConsistent)
    try withTracking { (tracking) throws(DirtyTrackingError) in try tracking.announceAnew() }
  }

  /// Does something with the tracker, if it has not been stopped.
  private func withTracking(
    _ body: (WriteProtectTracking) throws(DirtyTrackingError) -> Void
  ) throws(SnapshotError) {
    guard let tracking = tracking.withLock({ $0 }) else { return }
    do throws(DirtyTrackingError) {
      try body(tracking)
    } catch {
      throw SnapshotError(.tracking, error.description)
    }
  }

  /// Writes are let through from here on; the copies are of no use any more.
  func fail() { pool.fail() }

  // MARK: - The tracker's thread

  /// See `WriteProtectTracking.WriteHook`.
  func willWrite(_ pages: Range<Int>) {
    guard isActive.load(ordering: .acquiring) else { return }
    isInHook.store(true, ordering: .sequentiallyConsistent)
    if taken.insert(pages.lowerBound) {
      for page in pages { pool.add(page: page, from: layout.address(of: page)) }
    }
    isInHook.store(false, ordering: .sequentiallyConsistent)
  }

  // MARK: - Copying threads

  /// Copies those of the pages that are not in the pool, and lets the guest write them.
  ///
  /// - Parameter piece: whole pages of the backing, of one region.
  func copy(_ piece: [Range<Int>], into batch: PageBatch) throws(SnapshotError) {
    var ours: [Range<Int>] = []
    let unit = piece.first.map { layout.regions[layout.region(of: $0.lowerBound)].unit } ?? 1
    for run in piece {
      let start = batch.pages.count
      try batch.append(run, layout)
      var isLost = false
      for page in stride(from: run.lowerBound, to: run.upperBound, by: unit) {
        let pages = page..<page + unit
        guard taken.insert(page) else {
          isLost = true
          continue
        }
        if let last = ours.last, last.upperBound == page {
          ours[ours.count - 1] = last.lowerBound..<pages.upperBound
        } else {
          ours.append(pages)
        }
      }
      if isLost {
        batch.keep(from: start) { page in ours.contains { $0.contains(page) } }
      }
    }
    try withTracking { (tracking) throws(DirtyTrackingError) in
      for run in ours { try tracking.disarm(run) }
    }
  }

  /// Ends tracking when all pages of the snapshot have been copied: those that are left were
  /// absent at the pause.
  ///
  /// Throws when the tracker let writes through: then pages may be from after the pause.
  /// - Parameter drain: writes what the pool has, so that the tracker's thread gets room.
  func end(_ drain: () throws(SnapshotError) -> Void) throws(SnapshotError) {
    taken.insert(0..<layout.pageCount)
    // From here on the hook only looks; one that is still copying is waited for.
    while isInHook.load(ordering: .sequentiallyConsistent) {
      try drain()
      sched_yield()
    }
    try withTracking { (tracking) throws(DirtyTrackingError) in try tracking.check() }
    stop()
  }

  /// Lifts all protection and ends the tracker's thread. For failures `fail()` comes first.
  func stop() {
    let ended = tracking.withLock { $0.take() }
    ended?.stop()
  }
}
