// SPDX-License-Identifier: Apache-2.0

internal import Glibc
internal import LinuxSystem
internal import Synchronization
internal import SystemPackage

extension ImageDifference {
  /// Compares the memory of two images.
  ///
  /// Takes 8 MiB of memory for each thread, the indexes of both images (0.1 % of the memory
  /// each), and a bit for each block where something differs.
  ///
  /// - Parameters:
  ///   - threads: how many threads read and compare, the caller's among them.
  ///   - progress: told after each piece how many bytes of the memory that both have are done,
  ///     and how many there are; on any of the threads.
  /// - Throws: `damaged`, `truncated`, `inputOutput` and `limitExceeded`, for either image.
  public init(
    _ first: MemoryImage, _ second: MemoryImage, threads: Int = 2,
    progress: ImageProgress? = nil
  ) throws(ImageError) {
    let parts = Self.parts(first.regions, second.regions)
    let pieces = RegionPieces(blockCounts: parts.map { $0.isInBoth ? $0.blockCount : 0 })
    let counter = ByteProgress(
      total: parts.reduce(0) { $0 + ($1.isInBoth ? $1.blockCount * ImageLimits.blockSize : 0) },
      progress)
    let comparison = Comparison(first: first, second: second, same: SameBlocks(first, second))
    let result = Mutex(parts)
    let path = first.path
    try unsafe PieceWork(pieces: pieces.count, threads: threads).run(
      name: "diff", bufferLength: 2 * PieceWork.pieceLength,
      noMemory: { ImageError(.limitExceeded, path, "there is no memory to compare", errno: $0) }
    ) { (number, buffer) throws(ImageError) in
      let piece = pieces[number]
      // SAFETY: the buffer is two pieces long, and this thread's.
      let found = try unsafe comparison.compare(parts[piece.region], piece.blocks, buffer)
      result.withLock { parts in
        parts[piece.region].differing.formUnion(found.differing)
        parts[piece.region].zeroInFirst += found.zeroInFirst
        parts[piece.region].zeroInSecond += found.zeroInSecond
        parts[piece.region].comparedBlocks += found.comparedBlocks
      }
      counter.add(piece.bytes.count)
    }
    self.parts = result.withLock { $0 }
  }
}

/// Two images, and how they are compared piece by piece.
private struct Comparison: Sendable {
  let first, second: MemoryImage
  let same: SameBlocks

  /// Compares a range of blocks of a part that both have.
  ///
  /// - Parameter buffer: two pieces long.
  /// - Returns: the part, with what was found in the range.
  @unsafe func compare(
    _ part: ImageDifference.Part, _ blocks: Range<Int>, _ buffer: UnsafeMutableRawBufferPointer
  ) throws(ImageError) -> ImageDifference.Part {
    var found = part
    guard let left = part.first, let right = part.second else { return found }
    // SAFETY: the caller vouches for two pieces.
    let rooms = unsafe (
      UnsafeMutableRawBufferPointer(rebasing: buffer[..<PieceWork.pieceLength]),
      UnsafeMutableRawBufferPointer(rebasing: buffer[PieceWork.pieceLength...])
    )
    var block = blocks.lowerBound
    while block < blocks.upperBound {
      var end = block
      while end < blocks.upperBound,
        try !same.contains(
          first.checkedEntry(left.region, left.firstBlock + end),
          second.checkedEntry(right.region, right.firstBlock + end))
      { end += 1 }
      if end > block {
        // SAFETY: a run of a piece fits into its room.
        let bytes = unsafe (
          try first.read(left, block..<end, into: rooms.0),
          try second.read(right, block..<end, into: rooms.1)
        )
        for index in 0..<end - block {
          unsafe note(block + index, bytes.0, bytes.1, index, &found)
        }
        found.comparedBlocks += end - block
      }
      // The block that ended the run is the same in both.
      block = end + 1
    }
    return found
  }

  @unsafe private func note(
    _ block: Int, _ left: UnsafeRawPointer, _ right: UnsafeRawPointer, _ index: Int,
    _ found: inout ImageDifference.Part
  ) {
    let blockSize = ImageLimits.blockSize
    // SAFETY: the caller vouches for `index + 1` blocks in both.
    let blocks = unsafe (left + index * blockSize, right + index * blockSize)
    guard unsafe memcmp(blocks.0, blocks.1, blockSize) != 0 else { return }
    found.differing.insert(block)
    if unsafe isZeroBlock(blocks.0) { found.zeroInFirst += 1 }
    if unsafe isZeroBlock(blocks.1) { found.zeroInSecond += 1 }
  }
}

extension MemoryImage {
  /// The index entry of a block that the region has.
  fileprivate func checkedEntry(_ region: Int, _ block: Int) throws(ImageError) -> UInt32 {
    let (outcome, entry) = indexEntry(geometries[region], block: block)
    guard case .ready = outcome else {
      throw indexFailure(outcome, region: region, block: block)
    }
    return entry
  }

  /// Reads blocks counted from a place on.
  @unsafe fileprivate func read(
    _ place: ImageDifference.Place, _ blocks: Range<Int>,
    into room: UnsafeMutableRawBufferPointer
  ) throws(ImageError) -> UnsafeRawPointer {
    let part = unsafe UnsafeMutableRawBufferPointer(
      rebasing: room[..<(blocks.count * ImageLimits.blockSize)])
    _ = try unsafe read(
      region: place.region, offset: (place.firstBlock + blocks.lowerBound) * ImageLimits.blockSize,
      into: part)
    // SAFETY: a run has at least one block, so there is an address.
    return unsafe UnsafeRawPointer(part.baseAddress.unsafelyUnwrapped)
  }
}

/// What two images' indexes alone prove to be equal.
///
/// An image is named by its content id, so a block number of an image that both chains have is
/// the same content in both. Common ancestors need not have the same place in their chains.
struct SameBlocks: Sendable {
  /// Block numbers of the first chain, and what to add for the second's.
  private var shared: [(numbers: Range<Int>, shift: Int)] = []

  init(_ first: MemoryImage, _ second: MemoryImage) {
    let others = second.numberRanges
    for (id, numbers) in first.numberRanges {
      guard let other = others.first(where: { $0.id == id }) else { continue }
      let shift = other.numbers.lowerBound - numbers.lowerBound
      if let last = shared.last, last.shift == shift, last.numbers.upperBound == numbers.lowerBound
      {
        shared[shared.count - 1].numbers = last.numbers.lowerBound..<numbers.upperBound
      } else {
        shared.append((numbers, shift))
      }
    }
  }

  /// Whether two index entries are sure to name equal blocks.
  func contains(_ first: UInt32, _ second: UInt32) -> Bool {
    if first == 0 || second == 0 { return first == second }
    let number = Int(first) - 1
    return shared.contains { numbers, shift in
      numbers.contains(number) && Int(second) - 1 == number + shift
    }
  }
}

extension MemoryImage {
  /// The block numbers of each image of the chain, the oldest first.
  fileprivate var numberRanges: [(id: ContentID, numbers: Range<Int>)] {
    var base = 0
    var ranges: [(id: ContentID, numbers: Range<Int>)] = []
    for ancestor in ancestors {
      ranges.append((ancestor.contentID, base..<base + ancestor.blockNumbers))
      base += ancestor.blockNumbers
    }
    ranges.append((contentID, own.base..<own.base + own.chunks.blockNumbers))
    return ranges
  }
}
