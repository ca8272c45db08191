// SPDX-License-Identifier: Apache-2.0

internal import LinuxSystem
internal import Synchronization
internal import SystemPackage
internal import Userfault

/// The state of a `WriteProtectTracking` that runs, shared with its thread.
///
/// A page is *armed* when the kernel protects it, and *noted* when it was written and not
/// collected. Noting a page, lifting its protection and marking it as not armed must be one
/// step to `collect`, which takes the note and protects again: otherwise a write could
/// happen after the note was taken on a page that is left unprotected, and be lost. The same
/// holds for arming. So each does its step under the lock of the piece that the page lies
/// in. There are several locks so that arming with several threads gains something, and so
/// that a fault waits for one piece at most.
final class WriteProtectEngine: Sendable {
  private final class Lock: Sendable {
    let mutex = Mutex<Void>(())
  }

  private let layout: TrackedLayout
  private let hook: WriteProtectTracking.WriteHook?
  private let userfaultfd: Userfaultfd
  private let stopSign: EventDescriptor
  private let armed: AtomicPageSet
  private let noted: AtomicPageSet
  private let locks: [Lock]
  private let failure = Mutex<Errno?>(nil)
  /// Counts the calls of `announceAnew`.
  private let epoch = Atomic(0)
  private let piecePages = UserfaultTracking.piecePages

  init(
    _ layout: TrackedLayout, _ hook: WriteProtectTracking.WriteHook?
  ) throws(DirtyTrackingError) {
    do throws(Errno) {
      stopSign = try EventDescriptor()
      armed = try AtomicPageSet(pageCount: layout.pageCount)
      noted = try AtomicPageSet(pageCount: layout.pageCount)
    } catch {
      throw DirtyTrackingError("Making room for tracking \(layout.pageCount) pages", error)
    }
    self.layout = layout
    self.hook = hook
    locks = (0..<16).map { _ in Lock() }
    userfaultfd = try UserfaultTracking.makeUserfaultfd(.writeProtect, layout)
  }

  private func withLock<Value, Failure: Error>(
    of piece: TrackedLayout.Piece, _ body: () throws(Failure) -> Value
  ) throws(Failure) -> Value {
    let lock = locks[piece.number % locks.count]
    return try lock.mutex.withLock { _ throws(Failure) in try body() }
  }

  // MARK: - The thread

  /// Serves faults until the stop sign. Allocates nothing for a fault.
  func serve() {
    var events = EventBuffer()
    let waiter = PollSet(
      userfaultfd.descriptor.rawValue, stopSign.descriptor.rawValue)
    do throws(Errno) {
      while true {
        guard let ready = try waiter.wait() else { continue }
        // After the stop sign nothing is protected, and release() has woken all waiters.
        if ready.tag == 1 { return }
        guard ready.isReadable else { throw .ioError }
        _ = try events.read(from: userfaultfd)
        while let event = events.pop() {
          if case .pageFault(let fault) = event { resolve(fault) }
        }
      }
    } catch {
      // Nobody would let the writers go on: give up the tracking and not the guest.
      failure.withLock { $0 = error }
      UserfaultTracking.release(userfaultfd, layout)
    }
  }

  private func resolve(_ fault: PageFault) {
    guard let piece = layout.place(of: fault.address, piecePages: piecePages) else { return }
    while true {
      let told = epoch.load(ordering: .acquiring)
      if let hook {
        // Not armed: another vCPU's fault on that page was served, so it has been announced.
        // Under the lock, because arming may have protected it and not yet said so.
        if withLock(of: piece, { armed.contains(piece.pages.lowerBound) }) { hook(piece.pages) }
      }
      let isResolved = withLock(of: piece) {
        // This thread may have stood still since the hook; see `announceAnew`.
        guard epoch.load(ordering: .acquiring) == told else { return false }
        if armed.contains(piece.pages.lowerBound) {
          armed.remove(piece.pages)
          noted.insert(piece.pages)
        }
        // Also when it was not armed: it wakes the waiter. ENOENT after release(), which
        // wakes all.
        try? userfaultfd.writeProtect(piece.host, enabled: false)
        return true
      }
      if isResolved { return }
    }
  }

  /// What the hook was told before does not count any more.
  ///
  /// A resolution that lifts a protection after `collect` has been at its piece sees that, and
  /// begins anew. One that did it before has noted the page: `collect` takes the note and
  /// protects the page again. So nobody waits here for a thread that stands still.
  func announceAnew() { epoch.wrappingAdd(1, ordering: .releasing) }

  // MARK: - Arming

  func check() throws(DirtyTrackingError) {
    if let failure = failure.withLock({ $0 }) {
      throw DirtyTrackingError("Reading the faults of tracked memory", failure)
    }
  }

  func arm(_ pages: Range<Int>) throws(DirtyTrackingError) {
    try check()
    try layout.forEachPiece(of: pages, piecePages: piecePages) {
      piece throws(DirtyTrackingError) in
      do throws(Errno) {
        try withLock(of: piece) { () throws(Errno) in
          try userfaultfd.writeProtect(piece.host, enabled: true)
          armed.insert(piece.pages)
        }
      } catch {
        throw DirtyTrackingError("Write-protecting \(piece.host)", error)
      }
    }
  }

  func disarm(_ pages: Range<Int>) throws(DirtyTrackingError) {
    try check()
    try layout.forEachPiece(of: pages, piecePages: piecePages) {
      piece throws(DirtyTrackingError) in
      do throws(Errno) {
        try withLock(of: piece) { () throws(Errno) in
          armed.remove(piece.pages)
          try userfaultfd.writeProtect(piece.host, enabled: false)
        }
      } catch {
        throw DirtyTrackingError("Lifting the write protection of \(piece.host)", error)
      }
    }
  }

  // MARK: - Collecting

  func collect(into bitmap: inout DirtyBitmap) throws(DirtyTrackingError) {
    try check()
    var taken = DirtyBitmap(pageCount: layout.pageCount)
    defer { bitmap.formUnion(taken) }
    try layout.forEachPiece(of: 0..<layout.pageCount, piecePages: piecePages) {
      piece throws(DirtyTrackingError) in
      do throws(Errno) {
        try withLock(of: piece) { () throws(Errno) in
          guard noted.take(piece.pages, into: &taken) else { return }
          do throws(Errno) {
            try protectAgain(taken, piece)
          } catch {
            // The next collect tries again.
            for run in taken.ranges(in: piece.pages) { noted.insert(run) }
            throw error
          }
        }
      } catch {
        throw DirtyTrackingError("Write-protecting pages of \(piece.host) again", error)
      }
    }
  }

  /// Protects the pages of a piece that were taken: each run in a call of its own (3 µs), or
  /// where there are many all at once (60 to 150 µs), if nothing between them is to stay
  /// unprotected.
  private func protectAgain(
    _ taken: DirtyBitmap, _ piece: TrackedLayout.Piece
  ) throws(Errno) {
    func protect(_ pages: Range<Int>) throws(Errno) {
      let offset = (pages.lowerBound - piece.pages.lowerBound) * 4096
      try userfaultfd.writeProtect(
        HostRange(start: piece.host.start.advanced(by: offset), length: pages.count * 4096),
        enabled: true)
      armed.insert(pages)
    }
    if taken.count(in: piece.pages) > 40, armed.covers(piece.pages, with: taken) {
      return try protect(piece.pages)
    }
    for run in taken.ranges(in: piece.pages) { try protect(run) }
  }

  // MARK: - The end

  /// Lets everybody write and ends the thread.
  func release() {
    UserfaultTracking.release(userfaultfd, layout)
    stopSign.signal()
  }
}
