// SPDX-License-Identifier: Apache-2.0

internal import GuestMemory
internal import LinuxSystem
internal import Userfault

// Several pages in one step: for fault-around and for filling in bulk.
extension PagerSession {
  /// One step. Larger pieces cost less for each page (1.0 µs in 1 MiB, 1.1 µs in 64 KiB) but
  /// hold up the reading of events.
  static var pieceLength: Int { 256 << 10 }

  /// Zeros between data that are shorter are copied with it where all of it is wanted: each cut
  /// costs two calls of the kernel more, and a guest mostly writes to what it had left zero.
  static var zerosWithData: Int { 16 << 10 }

  /// Bytes of a thread's bench: a piece, or the largest page.
  var benchLength: Int {
    max(Self.pieceLength, regions.reduce(0) { max($0, $1.pageSize.bytes) })
  }

  /// Pages that were read from the source.
  struct FetchedRun {
    /// All zeros; nothing is in the buffer.
    var isZero: Bool
    /// Whole pages, from the first that was asked for.
    var count: Int
  }

  /// Reads the longest run of whole pages that is all data or all zeros.
  ///
  /// - Parameters:
  ///   - limit: pages that fit into the bench, at least 1.
  ///   - insists: reads on until there are that many. Otherwise one read of the source
  ///     decides: what it has at no extra cost.
  ///   - zeros: bytes; fewer zeros than that are data.
  /// - Returns: `count` 0 where the run ends inside of the first page (hugetlbfs), and where that
  ///   is not at hand and this thread may not wait.
  /// - Throws: when there is nothing right from the first page on.
  func fetchRun(
    _ first: Int, limit: Int, _ region: PagedRegion, _ bench: borrowing Workbench,
    insists: Bool, zeros: Int = 0
  ) throws(PageSourceError) -> FetchedRun {
    let size = region.pageSize.bytes
    let start = region.sourceOffset + first * size
    var done = 0
    while done < limit * size {
      let found: SourceRun?
      do {
        // SAFETY: the bench has room for `limit` pages.
        found = try unsafe read(
          region, offset: start + done, length: limit * size - done, zeros: zeros,
          into: bench.pointer + done, waits: bench.waits)
      } catch {
        // Damage further up is for the fault, or the step, that begins there.
        guard done >= size else { throw error }
        break
      }
      // The rest is not at hand, which is for a thread that may wait.
      guard let run = found else { break }
      if run.isZero {
        if done == 0 { return FetchedRun(isZero: true, count: run.length / size) }
        break
      }
      done += run.length
      if !insists { break }
    }
    return FetchedRun(isZero: false, count: done / size)
  }

  /// Asks the source; `nil` where it would have to wait and may not.
  @unsafe
  @inline(__always)
  func read(
    _ region: PagedRegion, offset: Int, length: Int, zeros: Int = 0,
    into buffer: UnsafeMutableRawPointer, waits: Bool
  ) throws(PageSourceError) -> SourceRun? {
    let number = region.sourceRegion
    // SAFETY: the caller vouches for room for `length` bytes.
    guard waits else {
      return try unsafe source.readAtHand(
        region: number, offset: offset, length: length, into: buffer)
    }
    return zeros > 0
      ? try unsafe source.read(
        region: number, offset: offset, length: length, zeros: zeros, into: buffer)
      : try unsafe source.read(region: number, offset: offset, length: length, into: buffer)
  }

  /// Installs pages that are claimed and that the bench holds, or zeros.
  ///
  /// - Returns: how many, 0 when the first of them needs the way of a single page.
  func installRun(
    _ first: Int, _ run: FetchedRun, _ region: PagedRegion, _ bench: borrowing Workbench,
    _ counters: borrowing WorkerCounters
  ) -> Int {
    gate.read {
      guard !wasReleased else { return 0 }
      var length = 0
      while length < run.count, region.states.load(first + length) == .filling { length += 1 }
      guard length > 0 else { return 0 }
      let range = region.range(of: first, count: length)
      let resolution: Resolution
      var call = Finding.Call.zeropage
      if run.isZero {
        resolution = memory.zeropage(range)
      } else {
        // SAFETY: the bench holds at least `length` pages from `first` on.
        unsafe region.holes?.clear(first..<first + length, in: bench.pointer)
        (resolution, call) = unsafe fillRange(
          from: bench.pointer, range, first, region, waits: bench.waits)
      }
      let done = resolution.bytesDone / region.pageSize.bytes
      region.states.take(.fill, first..<(first + done))
      if done > 0 { noteRoom() }
      switch call {
      case .zeropage: counters.zeroPages.add(UInt64(done))
      case .continue: counters.continuedPages.add(UInt64(done))
      default: counters.copiedPages.add(UInt64(done))
      }
      return done
    }
  }

  // MARK: - Fault-around

  /// Bytes that a fault may bring along; none while first touches are recorded.
  var faultAroundMaximum: Int { recorder.isRecording ? 0 : options.faultAround.maximum }

  /// Resolves a page that this thread has claimed, together with those after it that come at
  /// no extra cost or that `window` asks for.
  ///
  /// Neighbours are claimed when their content is there: one that is touched meanwhile is
  /// somebody else's.
  func fetchAndInstall(
    _ page: Int, window: Int, _ region: PagedRegion, _ bench: borrowing Workbench,
    _ counters: borrowing WorkerCounters
  ) -> FaultOutcome {
    let size = region.pageSize.bytes
    let room = max(1, min(bench.length, Self.pieceLength) / size)
    let limit = min(
      max(window, source.readAhead / size, 1), room, region.pageCount - page)
    if let share = region.share, limit > 1, faultAroundMaximum > 0 {
      switch self.share(page, limit: limit, isClaimed: false, region, share, bench, counters) {
      case .settled(let count) where count > 0:
        counters.broughtAlong.add(UInt64(count - 1))
        return .resolved
      case .deferred: return .deferred
      case .settled, .failed: return fetchAndInstall(page, region, bench, counters)
      }
    }
    guard limit > 1, faultAroundMaximum > 0,
      let run = try? fetchRun(page, limit: limit, region, bench, insists: window > 1),
      run.count > 1
    else { return fetchAndInstall(page, region, bench, counters) }
    let claimed = 1 + region.states.claim(from: page + 1, limit: run.count - 1)
    let installed = installRun(
      page, FetchedRun(isZero: run.isZero, count: claimed), region, bench, counters)
    giveBack(region, page + max(installed, 1)..<page + claimed)
    guard installed == 0 else {
      counters.broughtAlong.add(UInt64(installed - 1))
      return .resolved
    }
    return install(
      run.isZero ? .zero : .staged, page, region, bench, counters, expecting: .filling)
  }

  /// Fills some absent pages ahead of the guest; returns how far it came.
  func fillAhead(
    _ pages: Range<Int>, _ region: PagedRegion, _ bench: borrowing Workbench,
    _ counters: borrowing WorkerCounters
  ) -> Int {
    let room = max(1, min(bench.length, Self.pieceLength) / region.pageSize.bytes)
    var first = pages.lowerBound
    guard let absent = region.states.first(.absent, in: pages) else { return pages.upperBound }
    first = absent
    let limit = min(room, pages.upperBound - first)
    if let share = region.share {
      guard region.states.claim(from: first, limit: 1) == 1 else { return first + 1 }
      guard
        case .settled(let count) = self.share(
          first, limit: limit, isClaimed: false, region, share, bench, counters), count > 0
      else {
        giveBack(region, first..<first + 1)
        return pages.upperBound
      }
      counters.broughtAlong.add(UInt64(count))
      return first + count
    }
    guard let run = try? fetchRun(first, limit: limit, region, bench, insists: true),
      run.count > 0
    else { return pages.upperBound }
    let claimed = region.states.claim(from: first, limit: run.count)
    let installed = installRun(
      first, FetchedRun(isZero: run.isZero, count: claimed), region, bench, counters)
    giveBack(region, first + installed..<first + claimed)
    counters.broughtAlong.add(UInt64(installed))
    // An event, or a page that somebody else has: the guest's faults decide from there.
    return installed == run.count ? first + installed : pages.upperBound
  }
}
