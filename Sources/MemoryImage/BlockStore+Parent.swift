// SPDX-License-Identifier: Apache-2.0

internal import Glibc
internal import LinuxSystem
internal import SystemPackage

extension BlockStore {
  /// Begins with the parent's index: what nobody writes stays the parent's.
  func takeOverIndex() throws(ImageError) {
    guard let parent else { return }
    let isSame = parent.regions.elementsEqual(layout.regions) {
      $0.guestAddress == $1.guestAddress && $0.length == $1.length
    }
    guard isSame else {
      throw ImageError(.invalidArgument, path, "its regions are not those of \(parent.path)")
    }
    guard parent.ancestors.count < ImageLimits.ancestors else {
      throw ImageError(
        .limitExceeded, path, "it would have more than \(ImageLimits.ancestors) ancestors; merge")
    }
    guard !parent.reads(path) else {
      throw ImageError(
        .invalidArgument, path, "it would replace an image that it builds on; choose another name")
    }
    guard base + layout.chunkCapacity * options.blocksPerChunk < Int(UInt32.max) else {
      throw ImageError(.limitExceeded, path, "its chain would have too many blocks")
    }
    for (region, geometry) in layout.geometries.enumerated() {
      for page in 0..<geometry.indexPageCount {
        try copyIndexPage(page, of: geometry, region: region, from: parent)
      }
    }
  }

  private func copyIndexPage(
    _ page: Int, of geometry: RegionGeometry, region: Int, from parent: MemoryImage
  ) throws(ImageError) {
    let source = parent.geometries[region]
    var words = VerifiedPages.Staging(repeating: 0)
    let offset = source.offset(ofIndexPage: page)
    let outcome = VerifiedPages.read(
      into: &words, from: parent.own.file, offset: offset, seed: source.seed(ofIndexPage: page))
    switch outcome {
    case .ready: break
    case .failed(let errno):
      throw ImageError.reading(errno, parent.path, region: region, fileOffset: offset)
    case .damaged:
      throw ImageError(
        .damaged, parent.path, "page \(page) of the index does not match its checksum",
        region: region, fileOffset: offset)
    }
    // SAFETY: a page of the index in memory is 4096 bytes; the writer is not in use yet.
    unsafe withUnsafeBytes(of: &words) { bytes in
      let target = unsafe index.pointer + (geometry.firstIndexPage + page) * ImageLimits.blockSize
      if let start = bytes.baseAddress {
        unsafe target.copyMemory(from: start, byteCount: ImageLimits.blockSize - 8)
      }
    }
  }

  /// The parent's entry for a block that holds the same bytes there; `nil` where it does
  /// not, or where it cannot be read.
  @unsafe func parentEntry(
    region: Int, block: Int, equalTo bytes: UnsafeRawPointer, _ buffer: StagingBuffer
  ) -> UInt32? {
    guard let parent else { return nil }
    let (outcome, entry) = parent.indexEntry(parent.geometries[region], block: block)
    guard case .ready = outcome, entry != 0 else { return nil }
    // SAFETY: both are blocks of 4096 bytes.
    guard
      let read = try? unsafe parent.read(
        region: region, firstBlock: block, blockCount: 1, into: buffer.comparison),
      read.kind == .data, unsafe memcmp(buffer.comparison, bytes, ImageLimits.blockSize) == 0
    else { return nil }
    return entry
  }

  /// See `ImageWriter.searchParent`.
  func learnParent(threads: Int, _ counter: ByteProgress?) throws(ImageError) {
    guard let parent else { return }
    let pieces = RegionPieces(parent.regions)
    let (path, known) = (path, known)
    try unsafe PieceWork(pieces: pieces.count, threads: threads).run(
      name: "parent", bufferLength: PieceWork.pieceLength,
      noMemory: { ImageError(.limitExceeded, path, "there is no memory to read", errno: $0) }
    ) { (number, buffer) throws(ImageError) in
      guard let start = buffer.baseAddress else { return }
      let piece = pieces[number]
      var block = piece.blocks.lowerBound
      while block < piece.blocks.upperBound {
        // What cannot be read is not known, so that it is stored again. SAFETY: the buffer holds
        // a piece.
        let run = try? unsafe parent.read(
          region: piece.region, firstBlock: block, blockCount: piece.blocks.upperBound - block,
          into: start)
        if let run, run.kind == .data {
          for index in 0..<run.blockCount {
            let (outcome, entry) = parent.indexEntry(
              parent.geometries[piece.region], block: block + index)
            guard case .ready = outcome, entry != 0 else { continue }
            // SAFETY: the run's blocks are in the buffer.
            _ = unsafe known.number(
              of: start + index * ImageLimits.blockSize, orEnter: entry - 1)
          }
        }
        block += run?.blockCount ?? 1
      }
      counter?.add(piece.bytes.count)
    }
    knowsParent = true
  }

  /// The ancestors that the new image names, the oldest first.
  func chain() -> [ImageAncestor] {
    guard let parent else { return [] }
    let chunks = parent.own.chunks
    return parent.ancestors + [
      ImageAncestor(
        contentID: parent.contentID, pathHint: parent.path.hint, chunkCount: chunks.chunkCount,
        blocksPerChunk: chunks.blocksPerChunk)
    ]
  }
}

extension FilePath {
  /// The path as an absolute one, if it can be found.
  fileprivate var hint: FilePath {
    unsafe withPlatformString { path in
      guard let resolved = unsafe realpath(path, nil) else { return self }
      defer { unsafe free(resolved) }
      return unsafe FilePath(platformString: resolved)
    }
  }
}
