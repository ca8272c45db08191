// SPDX-License-Identifier: Apache-2.0

internal import LinuxSystem
internal import SystemPackage

extension MemoryImage {
  /// Reads the longest run, at most `blockCount` blocks, that is all zero or all data.
  ///
  /// Every block that it returns was checked against its checksum, in the buffer. It takes
  /// no lock and allocates nothing unless it throws; a warm block costs one pread(2) and
  /// one hash. Zero blocks cost no system call.
  ///
  /// A run may end early where another thread is just loading the index, and it ends
  /// before a block that is damaged or cannot be read: the error is thrown when that block
  /// comes first. So one bad block takes nothing away from its neighbours.
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
    let page = firstBlock / RegionGeometry.entriesPerPage
    if !index.isReady(geometry.firstIndexPage + page) {
      switch load(page, of: geometry) {
      case .ready: break
      case .busy:
        return try unsafe readAlone(region: region, block: firstBlock, into: buffer)
      case .damaged:
        throw indexDamage(region: region, block: firstBlock)
      case .failed(let errno):
        throw ImageError.reading(
          errno, path, region: region, regionName: regions[region].name, block: firstBlock,
          fileOffset: geometry.offset(ofIndexPage: page))
      }
    }
    let (isZero, count) = run(in: geometry, from: firstBlock, limit: blockCount)
    if isZero { return ImageRun(kind: .zero, blockCount: count) }
    let checked = try unsafe readData(
      region: region, firstBlock: firstBlock, blockCount: count, into: buffer
    ) { block in
      let page = block / RegionGeometry.entriesPerPage
      return index.entry(
        geometry.firstIndexPage &+ page, block &- page &* RegionGeometry.entriesPerPage)
    }
    return ImageRun(kind: .data, blockCount: checked)
  }

  // MARK: - Steps

  private func load(_ page: Int, of geometry: RegionGeometry) -> ReadOutcome {
    index.load(
      page: geometry.firstIndexPage + page, from: file,
      offset: geometry.offset(ofIndexPage: page), seed: geometry.seed(ofIndexPage: page))
  }

  /// The run from a block whose index page is ready. Ends before an index page that is not
  /// to be had.
  @inline(__always)
  private func run(
    in geometry: RegionGeometry, from firstBlock: Int, limit: Int
  ) -> (isZero: Bool, count: Int) {
    var page = firstBlock / RegionGeometry.entriesPerPage
    var slot = firstBlock - page * RegionGeometry.entriesPerPage
    let isZero = index.entry(geometry.firstIndexPage + page, slot) == 0
    var count = 1
    while count < limit {
      slot += 1
      if slot == RegionGeometry.entriesPerPage {
        (page, slot) = (page + 1, 0)
        if !index.isReady(geometry.firstIndexPage + page) {
          guard case .ready = load(page, of: geometry) else { break }
        }
      }
      if (index.entry(geometry.firstIndexPage + page, slot) == 0) != isZero { break }
      count += 1
    }
    return (isZero, count)
  }

  /// Reads data blocks as far as they are good.
  ///
  /// - Returns: checked blocks, at least one.
  @inline(__always)
  @unsafe
  private func readData(
    region: Int, firstBlock: Int, blockCount: Int, into buffer: UnsafeMutableRawPointer,
    checksum: (Int) -> UInt64
  ) throws(ImageError) -> Int {
    let geometry = geometries[region]
    let (good, outcome) = unsafe check(
      firstBlock..<firstBlock + blockCount, of: geometry, into: buffer, checksum: checksum)
    if good > 0 { return good }
    let offset = geometry.offset(ofBlock: firstBlock)
    if case .failed(let errno) = outcome {
      throw ImageError.reading(
        errno, path, region: region, regionName: regions[region].name, block: firstBlock,
        fileOffset: offset)
    }
    throw failure(
      .damaged, "the block does not match its checksum", region: region, block: firstBlock,
      fileOffset: offset)
  }

  /// Fills the buffer from the file and checks block by block; stops before the first bad
  /// one.
  ///
  /// - Parameters:
  ///   - blocks: not empty, in the region.
  ///   - buffer: room for them.
  ///   - checksum: the index's entry for a block.
  /// - Returns: how many blocks are good, and what is wrong with the next one: `ready` if
  ///   all are good.
  @inline(__always)
  @unsafe
  func check(
    _ blocks: Range<Int>, of geometry: RegionGeometry, into buffer: UnsafeMutableRawPointer,
    checksum: (Int) -> UInt64
  ) -> (good: Int, outcome: ReadOutcome) {
    let start = geometry.offset(ofBlock: blocks.lowerBound)
    let length = blocks.count * ImageLimits.blockSize
    var outcome = ReadOutcome.ready
    var done = 0
    while done < length {
      do throws(Errno) {
        // SAFETY: the caller vouches for room for all blocks.
        let rest = unsafe UnsafeMutableRawBufferPointer(start: buffer + done, count: length - done)
        let got = try unsafe file.read(into: rest, at: start + done)
        if got == 0 { throw .noData }
        done += got
      } catch {
        // The blocks before the bad spot may be good.
        outcome = .failed(error)
        break
      }
    }
    let filled = done / ImageLimits.blockSize
    var good = 0
    while good < filled {
      let block = blocks.lowerBound + good
      // SAFETY: `filled` blocks of the buffer were filled.
      let found = unsafe Checksum.of(
        buffer + good * ImageLimits.blockSize, length: ImageLimits.blockSize,
        seed: geometry.seed(ofBlock: block))
      if found != checksum(block) { return (good, .damaged) }
      good += 1
    }
    return (good, outcome)
  }

  /// Reads one block with an index page of its own, while another thread loads the shared
  /// one: nobody waits.
  @inline(never)
  @unsafe
  private func readAlone(
    region: Int, block: Int, into buffer: UnsafeMutableRawPointer
  ) throws(ImageError) -> ImageRun {
    let geometry = geometries[region]
    let page = block / RegionGeometry.entriesPerPage
    let offset = geometry.offset(ofIndexPage: page)
    let (outcome, entry) = VerifiedIndex.readEntry(
      block - page * RegionGeometry.entriesPerPage, from: file, offset: offset,
      seed: geometry.seed(ofIndexPage: page))
    switch outcome {
    case .ready: break
    case .failed(let errno):
      throw ImageError.reading(
        errno, path, region: region, regionName: regions[region].name, block: block,
        fileOffset: offset)
    case .damaged, .busy:
      throw indexDamage(region: region, block: block)
    }
    if entry == 0 { return ImageRun(kind: .zero, blockCount: 1) }
    _ = try unsafe readData(region: region, firstBlock: block, blockCount: 1, into: buffer) { _ in
      entry
    }
    return ImageRun(kind: .data, blockCount: 1)
  }

  private func indexDamage(region: Int, block: Int) -> ImageError {
    let page = block / RegionGeometry.entriesPerPage
    return failure(
      .damaged, "page \(page) of the index does not match its checksum", region: region,
      block: block, fileOffset: geometries[region].offset(ofIndexPage: page))
  }
}
