// SPDX-License-Identifier: Apache-2.0

internal import LinuxSystem
internal import SystemPackage

extension MemoryImage {
  /// Reads the longest run, at most `blockCount` blocks, that is all zero or all data.
  ///
  /// Every block that it returns was checked against its chunk's checksum. It takes no lock
  /// and allocates nothing unless it throws or more threads read at once than ever before; a
  /// warm block costs one pread(2), the decompression of its chunk, and one hash. Zero blocks
  /// cost no system call.
  ///
  /// A run ends before a block that is damaged or cannot be read: the error is thrown when
  /// that block comes first. So a bad chunk takes nothing away from its neighbours.
  ///
  /// Throws `outOfRange`, `damaged`, `truncated` (the file was cut while it was open) or
  /// `inputOutput`. The buffer's content is unspecified then.
  ///
  /// - Parameters:
  ///   - region: number of the region.
  ///   - firstBlock: number of a 4 KiB block in the region.
  ///   - blockCount: blocks, at least one; all of them in the region.
  ///   - buffer: room for `blockCount` blocks. For a run of data its blocks are filled; what
  ///     follows them is unspecified, and unchecked: do not use it. For a run of zeros the
  ///     buffer is untouched.
  @unsafe
  public func read(
    region: Int, firstBlock: Int, blockCount: Int, into buffer: UnsafeMutableRawPointer
  ) throws(ImageError) -> ImageRun {
    // SAFETY: as the caller vouches.
    try unsafe read(
      region: region, firstBlock: firstBlock, blockCount: blockCount, into: buffer, waits: true)
  }

  /// As `read`, but waits for no storage: `nil` where the first block, or what is needed to
  /// find it, is not in the page cache, and where the filesystem cannot tell.
  @unsafe
  public func readAtHand(
    region: Int, firstBlock: Int, blockCount: Int, into buffer: UnsafeMutableRawPointer
  ) throws(ImageError) -> ImageRun? {
    // SAFETY: as the caller vouches.
    let run = try unsafe read(
      region: region, firstBlock: firstBlock, blockCount: blockCount, into: buffer, waits: false)
    return run.blockCount > 0 ? run : nil
  }

  /// - Returns: a run of no blocks where `waits` is `false` and it would have to.
  @unsafe
  @inline(__always)
  private func read(
    region: Int, firstBlock: Int, blockCount: Int, into buffer: UnsafeMutableRawPointer,
    waits: Bool
  ) throws(ImageError) -> ImageRun {
    let geometry = try geometry(region, firstBlock: firstBlock, blockCount: blockCount)
    let (outcome, first) = indexEntry(geometry, block: firstBlock, waits: waits)
    guard case .ready = outcome else {
      if !waits, outcome.wouldWait { return ImageRun(kind: .data, blockCount: 0) }
      throw indexFailure(outcome, region: region, block: firstBlock)
    }
    if first == 0 {
      let count = run(of: geometry, from: firstBlock, limit: blockCount, waits: waits) { _, entry in
        entry == 0
      }
      return ImageRun(kind: .zero, blockCount: count)
    }
    var done = 0
    var entry = first
    while true {
      // As many as follow each other where they are stored.
      let number = Int(entry) - 1
      let store = store(of: number)
      let room = min(blockCount - done, store.room(from: number))
      let count = run(of: geometry, from: firstBlock + done, limit: room, waits: waits) {
        index, next in
        Int(next) == number + 1 + index
      }
      // SAFETY: the caller vouches for room for all blocks.
      let (good, problem) = try unsafe store.readBlocks(
        number, count: count, into: buffer + done * ImageLimits.blockSize, pages: pages,
        decoders: decoders, waits: waits)
      done += good
      if let problem {
        if done > 0 || (!waits && problem.outcome.wouldWait) { break }
        throw dataFailure(problem, store, region: region, block: firstBlock)
      }
      // What a chunk lacks is looked at when it comes first.
      guard good == count, done < blockCount else { break }
      let next = indexEntry(geometry, block: firstBlock + done, waits: waits)
      guard case .ready = next.outcome, next.entry != 0 else { break }
      entry = next.entry
    }
    return ImageRun(kind: .data, blockCount: done)
  }

  // MARK: - Steps

  /// A region's geometry, if it has these blocks.
  @inline(__always)
  func geometry(
    _ region: Int, firstBlock: Int, blockCount: Int
  ) throws(ImageError) -> RegionGeometry {
    guard region >= 0, region < geometries.count else {
      throw ImageError(.outOfRange, path, "it has no region \(region)")
    }
    let geometry = geometries[region]
    guard firstBlock >= 0, blockCount > 0, firstBlock < geometry.blockCount,
      blockCount <= geometry.blockCount - firstBlock
    else {
      throw failure(
        .outOfRange, "\(blockCount) blocks are not there", region: region, block: firstBlock)
    }
    return geometry
  }

  /// The index entry of a block: 0, or 1 + the number of a stored block.
  @inline(__always)
  func indexEntry(
    _ geometry: RegionGeometry, block: Int, waits: Bool = true
  ) -> (outcome: ReadOutcome, entry: UInt32) {
    let page = block / RegionGeometry.entriesPerPage
    let slot = block - page * RegionGeometry.entriesPerPage
    var entry: UInt32 = 0
    let outcome = readIndex(geometry, page: page, &entry, waits: waits) { $0.half(slot) }
    return (outcome, entry)
  }

  /// Looks something up in an index page; see `VerifiedPages.read`.
  @inline(__always)
  func readIndex<Value>(
    _ geometry: RegionGeometry, page: Int, _ value: inout Value, waits: Bool = true,
    _ body: (VerifiedPage) -> Value
  ) -> ReadOutcome {
    pages.read(
      geometry.firstIndexPage + page, from: own.file, offset: geometry.offset(ofIndexPage: page),
      seed: geometry.seed(ofIndexPage: page), &value, waits: own.mayWait(waits), body)
  }

  /// How many blocks from one on, itself included, satisfy a condition. Ends before an index
  /// page that is not to be had.
  @inline(__always)
  func run(
    of geometry: RegionGeometry, from firstBlock: Int, limit: Int, waits: Bool,
    while condition: (_ index: Int, _ entry: UInt32) -> Bool
  ) -> Int {
    var count = 1
    while count < limit {
      let block = firstBlock + count
      let page = block / RegionGeometry.entriesPerPage
      let slot = block - page * RegionGeometry.entriesPerPage
      // Those of one page are looked at together.
      let length = min(limit - count, RegionGeometry.entriesPerPage - slot)
      var found = 0
      let outcome = readIndex(geometry, page: page, &found, waits: waits) { entries in
        var index = 0
        while index < length, condition(count + index, entries.half(slot + index)) { index += 1 }
        return index
      }
      guard case .ready = outcome else { break }
      count += found
      if found < length { break }
    }
    return count
  }

  @inline(never)
  func indexFailure(_ outcome: ReadOutcome, region: Int, block: Int) -> ImageError {
    let page = block / RegionGeometry.entriesPerPage
    let offset = geometries[region].offset(ofIndexPage: page)
    return own.failure(
      outcome, "page \(page) of the index does not match its checksum", region: region,
      regionName: regions[region].name, block: block, fileOffset: offset)
  }

  @inline(never)
  func dataFailure(
    _ problem: ChunkOutcome, _ store: ChunkStore, region: Int, block: Int
  ) -> ImageError {
    store.failure(
      problem.outcome, "the block does not match its checksum", region: region,
      regionName: regions[region].name, block: block, fileOffset: problem.fileOffset)
  }
}
