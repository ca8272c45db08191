// SPDX-License-Identifier: Apache-2.0

internal import GuestMemory
internal import LinuxSystem
public import MemoryImage
public import SystemPackage

extension PagerSession {
  /// Whether first touches are recorded at present.
  public var isRecording: Bool { recorder.isRecording }

  /// Whether they are, or were at some time.
  public var hasRecorded: Bool { recorder.hasRecorded }

  /// Records first touches from here on, after those that were recorded before. Pages that are
  /// there already are not touched for the first time any more. Faults bring nothing along
  /// meanwhile.
  ///
  /// Takes 8 bytes for each page of the session, the first time. Throws what the kernel says when
  /// there is no memory for that.
  public func startRecording() throws(Errno) { try recorder.start() }

  /// Records no more, but for a fault that is under way. What was recorded stays.
  public func stopRecording() { recorder.stop() }

  /// The pages that the guest touched while the session recorded (`PagerOptions.records`,
  /// `startRecording`), in the order of their first touches and by the numbers of the source;
  /// huge pages are 512 blocks or more. Runs that follow each other are one.
  ///
  /// Also while the session runs.
  public var recordedWorkingSet: [WorkingSetRun] {
    var seen: Set<UInt64> = []
    var runs: [WorkingSetRun] = []
    for address in recorder.addresses() where seen.insert(address.rawValue).inserted {
      guard let region = region(at: address) else { continue }
      let size = region.pageSize.bytes
      let offset = region.sourceOffset + region.page(of: address) * size
      let run = WorkingSetRun(
        region: region.sourceRegion, firstBlock: offset / 4096, blockCount: size / 4096)
      if let last = runs.last, last.region == run.region,
        last.firstBlock + last.blockCount == run.firstBlock
      {
        runs[runs.count - 1].blockCount += run.blockCount
      } else {
        runs.append(run)
      }
    }
    return runs
  }

  /// Brings the pages of a working set in its order, those of zeros too: before the guest
  /// runs, or while it does. Its faults go first, for other threads serve them.
  ///
  /// Pages that the session does not have are passed over. Ends early when the session is stopped.
  /// Throws what `populate` throws.
  ///
  /// - Parameter progress: called from the filling threads with bytes done and bytes in all.
  public func replay(
    _ runs: [WorkingSetRun], progress: (@Sendable (_ done: Int, _ total: Int) -> Void)? = nil
  ) throws(PagerError) {
    try fill(joined(pieces(of: runs)), isReplay: true, progress: progress)
  }

  /// The pages of a working set that the session has, in its order, but those that lie within a
  /// step of each other together: bringing them one by one costs several times as much, and all
  /// of them are wanted.
  func pieces(of runs: [WorkingSetRun]) -> [FillPiece] {
    var isWanted = regions.map { [Bool](repeating: false, count: $0.pageCount) }
    var isListed = regions.map { region in
      [Bool](repeating: false, count: region.pageCount / pagesInStep(region) + 1)
    }
    var steps: [(region: Int, step: Int)] = []
    for run in runs {
      let wanted = run.firstBlock * 4096..<(run.firstBlock + run.blockCount) * 4096
      for (number, region) in regions.enumerated() where region.sourceRegion == run.region {
        let size = region.pageSize.bytes
        let own = region.sourceOffset..<region.sourceOffset + region.host.length
        let part = wanted.clamped(to: own)
        guard !part.isEmpty else { continue }
        let first = (part.lowerBound - own.lowerBound) / size
        let last = (part.upperBound - own.lowerBound + size - 1) / size
        for page in first..<last {
          isWanted[number][page] = true
          let step = page / pagesInStep(region)
          if !isListed[number][step] {
            isListed[number][step] = true
            steps.append((number, step))
          }
        }
      }
    }
    var pieces: [FillPiece] = []
    for (number, step) in steps {
      let region = regions[number]
      let length = pagesInStep(region)
      var page = step * length
      let end = min(page + length, region.pageCount)
      while page < end {
        let first = page
        while page < end, isWanted[number][page] { page += 1 }
        if page > first { pieces.append(FillPiece(region: region, pages: first..<page)) }
        page += 1
      }
    }
    return pieces
  }

  /// Pieces that follow each other as one, up to 1 MiB: where one thread ends and another goes on,
  /// both decompress the chunk that lies there.
  private func joined(_ pieces: [FillPiece]) -> [FillPiece] {
    var joined: [FillPiece] = []
    for piece in pieces {
      if let last = joined.last, last.region === piece.region,
        last.pages.upperBound == piece.pages.lowerBound, last.bytes + piece.bytes <= 1 << 20
      {
        let pages = last.pages.lowerBound..<piece.pages.upperBound
        joined[joined.count - 1] = FillPiece(region: last.region, pages: pages)
      } else {
        joined.append(piece)
      }
    }
    return joined
  }

  private func pagesInStep(_ region: PagedRegion) -> Int {
    max(1, (region.share == nil ? Self.pieceLength : Self.sharedLength) / region.pageSize.bytes)
  }
}
