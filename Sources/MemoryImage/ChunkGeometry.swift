// SPDX-License-Identifier: Apache-2.0

internal import LinuxSystem

/// Where the chunks of one image are (docs/image-format.md, "Stored blocks and chunks").
/// Plain numbers: the hot path copies it.
struct ChunkGeometry: Sendable {
  /// Whether chunks are single blocks as they are.
  let isStored: Bool
  /// Blocks of a chunk, 1 to 16.
  let blocksPerChunk: Int
  let chunkCount: Int
  /// Bytes from the start of the file to the chunk table.
  let tableOffset: Int
  /// Bytes from the start of the file to the data, and of the data.
  let dataOffset: Int
  let dataLength: Int
  /// Seeds.
  let tableKey: UInt64
  let chunkKey: UInt64

  /// From a header whose fields were checked.
  init(_ header: ImageHeader) {
    isStored = header.encoding == 0
    blocksPerChunk = Int(header.blocksPerChunk)
    chunkCount = Int(header.chunkCount)
    tableOffset = Int(header.chunkTableOffset)
    dataOffset = Int(header.dataOffset)
    dataLength = Int(header.dataLength)
    tableKey = Checksum.key(header.id, .chunkTable)
    chunkKey = Checksum.key(header.id, .chunk)
  }

  /// Entries of a page of the table.
  static func entriesPerPage(isStored: Bool) -> Int { isStored ? 511 : 255 }

  static func tablePageCount(chunks: Int, isStored: Bool) -> Int {
    let entries = entriesPerPage(isStored: isStored)
    return (chunks + entries - 1) / entries
  }

  var tablePageCount: Int { Self.tablePageCount(chunks: chunkCount, isStored: isStored) }

  /// Numbers that its blocks take.
  var blockNumbers: Int { chunkCount * blocksPerChunk }

  /// The page of the table that has a chunk, and the entry in it.
  @inline(__always)
  func place(of chunk: Int) -> (page: Int, slot: Int) {
    let entries = Self.entriesPerPage(isStored: isStored)
    let page = chunk / entries
    return (page, chunk - page * entries)
  }

  /// Bytes from the start of the file.
  func offset(ofTablePage page: Int) -> Int { tableOffset + page * ImageLimits.blockSize }

  func seed(ofTablePage page: Int) -> UInt64 { Checksum.seed(tableKey, position: page) }

  @inline(__always)
  func seed(ofChunk chunk: Int) -> UInt64 { Checksum.seed(chunkKey, position: chunk) }
}

/// Where a chunk's bytes are and what its content hashes to.
struct ChunkEntry: Equatable {
  static let lengthBits: UInt64 = 20

  /// Bytes from the data offset.
  var offset: Int
  /// Bytes in the file.
  var length: Int
  var checksum: UInt64

  init(offset: Int, length: Int, checksum: UInt64) {
    (self.offset, self.length, self.checksum) = (offset, length, checksum)
  }

  /// From the words of the table.
  init(place: UInt64, checksum: UInt64) {
    offset = Int(place >> Self.lengthBits)
    length = Int(place & (1 << Self.lengthBits - 1))
    self.checksum = checksum
  }

  var place: UInt64 { UInt64(offset) << Self.lengthBits | UInt64(length) }
}
