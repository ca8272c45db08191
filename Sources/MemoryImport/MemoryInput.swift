// SPDX-License-Identifier: Apache-2.0

public import LinuxSystem
public import MemoryImage
public import SystemPackage

/// A stretch of a region that a file holds.
public struct InputExtent: Sendable, Hashable {
  /// Bytes from the start of the region.
  public let offset: Int
  /// Bytes, at least one.
  public let length: Int
  /// Which one of `MemoryInput.files`.
  public let file: Int
  /// Bytes from the start of that file.
  public let fileOffset: Int
}

/// Where an image is made from: regions of guest memory, and which files hold their bytes.
/// What no file holds is zero.
///
/// Files can lie in layers, such as a base and its diffs: of those that have data at a place,
/// the last one wins. Holes are asked for when they are needed (SEEK_DATA, lseek(2)), not
/// collected: a value has constant size, however many holes the files have. All methods may
/// be called by several threads at once.
public struct MemoryInput: Sendable {
  /// Guest memory, in the order of the file or of addresses.
  public let regions: [ImageRegion]

  let layers: [InputFile]
  /// For each region where its parts are, ordered and without overlap. All layers have a
  /// part at the same place.
  let pieces: [[InputPiece]]

  /// The files, from the lowest layer to the highest.
  public var files: [FilePath] { layers.map(\.path) }

  /// Which files these are, whatever their names.
  public var inputFiles: [FileIdentity] { layers.map(\.identity) }

  /// Bytes of all regions.
  public var length: Int { regions.reduce(0) { $0 + $1.length } }

  init(regions: [ImageRegion], layers: [InputFile], pieces: [[InputPiece]]) {
    precondition(regions.count == pieces.count)
    self.regions = regions
    self.layers = layers
    self.pieces = pieces
  }
}

/// Part of a region that lies in one piece in each layer's file.
struct InputPiece: Sendable, Hashable {
  /// Bytes from the start of the region.
  var offset: Int
  /// Bytes.
  var length: Int
  /// Bytes from the start of the file.
  var fileOffset: Int

  var end: Int { offset + length }
}

// MARK: - Extents

extension MemoryInput {
  /// The first stretch of data at or after an offset: walk through them all by asking again
  /// from the end of the last one.
  ///
  /// - Parameters:
  ///   - region: its number.
  ///   - offset: bytes from the start of the region.
  ///   - limit: bytes from the start of the region; nothing from there on is looked at.
  ///     `nil`: the end of the region.
  /// - Returns: the extent; `nil` where only zeros follow.
  /// - Throws: `outOfRange`, `changed`, and `inputOutput` with what lseek(2) said.
  public func nextExtent(
    region: Int, from offset: Int, limit: Int? = nil
  ) throws(ImportError) -> InputExtent? {
    let end = limit ?? (regions.indices.contains(region) ? regions[region].length : 0)
    try check(region: region, offset: offset, length: end - offset)
    let pieces = pieces[region]
    var index = firstPiece(of: pieces, endingAfter: offset)
    while index < pieces.count, pieces[index].offset < end {
      let piece = pieces[index]
      let shift = piece.fileOffset - piece.offset
      let range = max(offset, piece.offset) + shift..<min(end, piece.end) + shift
      if let (file, found) = try nextData(in: range) {
        return InputExtent(
          offset: found.lowerBound - shift, length: found.count, file: file,
          fileOffset: found.lowerBound)
      }
      index += 1
    }
    return nil
  }

  /// The first data in a range of offsets that is the same in all layers' files, as far as one
  /// layer has it and none above has.
  private func nextData(
    in range: Range<Int>
  ) throws(ImportError) -> (file: Int, range: Range<Int>)? {
    var best: (file: Int, range: Range<Int>)?
    var end = range.upperBound
    // From the highest layer down: data further down counts up to where data above begins,
    // so what is found last comes first and has nothing above it.
    for file in layers.indices.reversed() where range.lowerBound < end {
      guard let found = try layers[file].nextData(in: range.lowerBound..<end) else { continue }
      best = (file, found)
      end = found.lowerBound
    }
    return best
  }

  /// Binary search for the first piece that ends after an offset.
  private func firstPiece(of pieces: [InputPiece], endingAfter offset: Int) -> Int {
    var (low, high) = (0, pieces.count)
    while low < high {
      let middle = (low + high) / 2
      if pieces[middle].end > offset { high = middle } else { low = middle + 1 }
    }
    return low
  }

  private func check(region: Int, offset: Int, length: Int) throws(ImportError) {
    guard regions.indices.contains(region), offset >= 0, length >= 0,
      offset <= regions[region].length, length <= regions[region].length - offset
    else {
      throw ImportError(
        .outOfRange, layers[0].path, "region \(region) has no \(length) bytes at \(offset)")
    }
  }
}

// MARK: - Reading

extension MemoryInput: RegionSource {
  /// Reads part of a region (pread(2)); what no file holds becomes zeros.
  ///
  /// - Parameters:
  ///   - region: its number.
  ///   - offset: bytes from the start of the region.
  ///   - buffer: filled completely.
  /// - Returns: whether any file holds some of it; `false` if it is all hole and the buffer
  ///   zeros. Data can be zeros too.
  /// - Throws: `outOfRange`, `changed` when a file was cut, `inputOutput`. Then any part of
  ///   the buffer may have been written.
  @unsafe @discardableResult
  public func read(
    region: Int, offset: Int, into buffer: UnsafeMutableRawBufferPointer
  ) throws(ImportError) -> Bool {
    try check(region: region, offset: offset, length: buffer.count)
    var position = 0
    var hasData = false
    while position < buffer.count {
      let extent = try nextExtent(
        region: region, from: offset + position, limit: offset + buffer.count)
      let start = extent.map { $0.offset - offset } ?? buffer.count
      // SAFETY: position, start and the extent's end lie in the buffer: the limit says so.
      unsafe zero(UnsafeMutableRawBufferPointer(rebasing: buffer[position..<start]))
      guard let extent else { break }
      position = start + extent.length
      try unsafe layers[extent.file].read(
        into: UnsafeMutableRawBufferPointer(rebasing: buffer[start..<position]),
        at: extent.fileOffset)
      hasData = true
    }
    return hasData
  }

  /// Where the first byte in a range is that a file holds; `nil` where all of it is zeros.
  /// Throws what `nextExtent` throws.
  public func nextData(region: Int, in range: Range<Int>) throws(ImportError) -> Int? {
    try nextExtent(region: region, from: range.lowerBound, limit: range.upperBound)?.offset
  }

  @unsafe private func zero(_ buffer: UnsafeMutableRawBufferPointer) {
    guard let start = buffer.baseAddress, buffer.count > 0 else { return }
    // SAFETY: the caller vouches for the buffer.
    unsafe start.initializeMemory(as: UInt8.self, repeating: 0, count: buffer.count)
  }
}
