// SPDX-License-Identifier: Apache-2.0

public import LinuxSystem
public import SystemPackage

/// Called with bytes done and bytes in all, from several threads.
public typealias ImageProgress = @Sendable (_ done: Int, _ total: Int) -> Void

extension MemoryImage {
  /// Which files are read: its own, and those of the images that it builds on.
  public var inputFiles: [FileIdentity] { ([own] + others).map(\.opened.identity) }

  /// Whether a path has one of these files, under whichever name.
  func reads(_ path: FilePath) -> Bool {
    FileStatus(at: path).map { inputFiles.contains($0.identity) } ?? false
  }

  /// Bytes of all regions.
  public var guestBytes: Int { regions.reduce(0) { $0 + $1.length } }

  /// Writes an image that holds everything itself, whatever this one builds on; device
  /// states, metadata and a sound working set come along.
  ///
  /// Throws what reading and writing throw, and `invalidArgument` for the path of an image of its
  /// chain; then nothing is left behind.
  public func merge(
    to path: FilePath, options: ImageOptions = ImageOptions(), threads: Int = 2,
    progress: ImageProgress? = nil
  ) throws(ImageError) {
    guard !reads(path) else {
      throw ImageError(
        .invalidArgument, path, "it would replace an image that is read; choose another name")
    }
    var writer = try ImageWriter(path: path, regions: regions, options: options)
    for state in states { try writer.add(state: state) }
    for (key, value) in metadata { try writer.setMetadata(key: key, value: value) }
    let blocks = writer.blocks
    let id = writer.id
    try unsafe forEachRun(threads: threads, progress) { region, block, bytes throws(ImageError) in
      try unsafe blocks.write(region: region, firstBlock: block, bytes: bytes)
    }
    try writer.finish()
    guard let set = try? workingSet() else { return }
    let written = try MemoryImage(path: path)
    guard written.id == id else {
      throw ImageError(.changed, path, "somebody else has put an image there meanwhile")
    }
    try written.storeWorkingSet(set.runs)
  }

  /// Reads everything, 4 MiB at a time, and hands out the runs of data.
  private func forEachRun(
    threads: Int, _ progress: ImageProgress?,
    _ body:
      @escaping @Sendable (
        _ region: Int, _ block: Int, _ bytes: UnsafeRawBufferPointer
      ) throws(ImageError) -> Void
  ) throws(ImageError) {
    let pieces = RegionPieces(regions)
    let counter = ByteProgress(total: guestBytes, progress)
    let path = path
    try unsafe PieceWork(pieces: pieces.count, threads: threads).run(
      name: "image", bufferLength: PieceWork.pieceLength,
      noMemory: { ImageError(.limitExceeded, path, "there is no memory to read it", errno: $0) }
    ) { [self] (number, buffer) throws(ImageError) in
      let piece = pieces[number]
      guard let start = buffer.baseAddress else { return }
      var block = piece.blocks.lowerBound
      while block < piece.blocks.upperBound {
        // SAFETY: the buffer holds a piece.
        let run = try unsafe read(
          region: piece.region, firstBlock: block, blockCount: piece.blocks.upperBound - block,
          into: start)
        if run.kind == .data {
          try unsafe body(
            piece.region, block,
            UnsafeRawBufferPointer(start: start, count: run.blockCount * ImageLimits.blockSize))
        }
        block += run.blockCount
      }
      counter.add(piece.bytes.count)
    }
  }
}

// MARK: - As bytes

extension MemoryImage {
  /// Reads part of a region, zeros and data alike.
  ///
  /// - Parameters:
  ///   - region: its number.
  ///   - offset: bytes from the start of the region, a multiple of 4 KiB.
  ///   - buffer: filled completely; a multiple of 4 KiB.
  /// - Returns: `false` if all of it is known to be zeros.
  /// - Throws: what reading blocks throws; then any part of the buffer may have been written.
  @unsafe
  public func read(
    region: Int, offset: Int, into buffer: UnsafeMutableRawBufferPointer
  ) throws(ImageError) -> Bool {
    let blockSize = ImageLimits.blockSize
    guard offset % blockSize == 0, buffer.count % blockSize == 0 else {
      throw ImageError(
        .outOfRange, path, "\(buffer.count) bytes at \(offset) are not whole blocks")
    }
    guard let start = buffer.baseAddress else { return false }
    var hasData = false
    var done = 0
    while done < buffer.count {
      // SAFETY: the buffer has room for what is left of it.
      let run = try unsafe read(
        region: region, firstBlock: (offset + done) / blockSize,
        blockCount: (buffer.count - done) / blockSize, into: start + done)
      let length = run.blockCount * blockSize
      switch run.kind {
      case .data: hasData = true
      case .zero:
        unsafe (start + done).initializeMemory(as: UInt8.self, repeating: 0, count: length)
      }
      done += length
    }
    return hasData
  }

  /// Where the first data in a range of a region is, by the index alone.
  ///
  /// - Parameters:
  ///   - region: its number.
  ///   - range: bytes from the start of the region, multiples of 4 KiB.
  /// - Returns: bytes from the start of the region; `nil` where all of it is zeros.
  /// - Throws: `outOfRange`, `damaged`, `inputOutput`.
  public func nextData(region: Int, in range: Range<Int>) throws(ImageError) -> Int? {
    let blockSize = ImageLimits.blockSize
    guard regions.indices.contains(region), range.lowerBound >= 0,
      range.upperBound <= regions[region].length, range.lowerBound % blockSize == 0,
      range.upperBound % blockSize == 0
    else { throw ImageError(.outOfRange, path, "region \(region) has no blocks at \(range)") }
    for block in range.lowerBound / blockSize..<range.upperBound / blockSize {
      let (outcome, entry) = indexEntry(geometries[region], block: block)
      guard case .ready = outcome else {
        throw indexFailure(outcome, region: region, block: block)
      }
      if entry != 0 { return block * blockSize }
    }
    return nil
  }
}
