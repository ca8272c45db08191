// SPDX-License-Identifier: Apache-2.0

internal import SystemPackage

/// Where a table is and what its bytes hash to.
struct TableReference: Equatable {
  var offset: UInt64 = 0
  var length: UInt64 = 0
  var checksum: UInt64 = 0
}

/// The first 4096 bytes of an image (docs/image-format.md, "Header").
struct ImageHeader: Equatable {
  static let length = 4096
  static let magic: [UInt8] = [0x89, 0x46, 0x4C, 0x49, 0x4D, 0x47, 0x0D, 0x0A]
  static let version: UInt32 = 2

  private static let reservedStart = 232
  private static let checksumOffset = 4088

  var fileLength: UInt64
  var id: ImageID
  var regionCount: UInt32
  var stateCount: UInt32
  var metadataCount: UInt32
  var regionTable = TableReference()
  var stateTable = TableReference()
  var metadata = TableReference()
  /// 0: chunks are single blocks as they are; 1: zstd frames.
  var encoding: UInt32 = 0
  var blocksPerChunk: UInt32 = 1
  var ancestorCount: UInt32 = 0
  var ancestors = TableReference()
  var chunkTableOffset: UInt64 = 0
  var chunkCount: UInt64 = 0
  var dataOffset: UInt64 = 0
  var dataLength: UInt64 = 0
  var contentID = ContentID()

  // MARK: - Encoding

  /// The header's bytes, checksum included.
  func encoded() -> [UInt8] {
    var bytes = Self.magic
    bytes.reserveCapacity(Self.length)
    bytes.append(integer: Self.version)
    bytes.append(integer: UInt32(Self.length))
    bytes.append(integer: fileLength)
    bytes.append(integer: id.low)
    bytes.append(integer: id.high)
    bytes.append(integer: regionCount)
    bytes.append(integer: stateCount)
    bytes.append(integer: metadataCount)
    bytes.append(integer: UInt32(ImageLimits.blockSize))
    for table in [regionTable, stateTable, metadata] { Self.append(table, to: &bytes) }
    bytes.append(integer: encoding)
    bytes.append(integer: blocksPerChunk)
    bytes.append(integer: ancestorCount)
    bytes.append(integer: UInt32(0))
    Self.append(ancestors, to: &bytes)
    for word in [chunkTableOffset, chunkCount, dataOffset, dataLength] {
      bytes.append(integer: word)
    }
    bytes.append(contentsOf: contentID.bytes)
    bytes.append(zeros: Self.checksumOffset - bytes.count)
    bytes.append(integer: Checksum.of(bytes, seed: 0))
    return bytes
  }

  private static func append(_ table: TableReference, to bytes: inout [UInt8]) {
    bytes.append(integer: table.offset)
    bytes.append(integer: table.length)
    bytes.append(integer: table.checksum)
  }

  // MARK: - Decoding

  /// Checks all that the header says about itself, but not against the file.
  ///
  /// - Parameter bytes: the file's first 4096 bytes, or all of a shorter file.
  init(decoding bytes: [UInt8], path: FilePath) throws(ImageError) {
    guard !bytes.isEmpty, bytes.prefix(8).elementsEqual(Self.magic.prefix(bytes.count)) else {
      throw ImageError(.notAnImage, path, "it does not begin as an image does")
    }
    guard bytes.count >= Self.length else {
      throw ImageError(
        .truncated, path, "it has \(bytes.count) bytes, fewer than the header's \(Self.length)")
    }
    var reader = ByteReader(bytes, from: Self.magic.count)
    let version: UInt32 = reader.next()
    guard version == Self.version else {
      throw ImageError(
        .unsupportedVersion, path, "it is of version \(version); this build reads \(Self.version)")
    }
    let headerLength: UInt32 = reader.next()
    let checksum = ByteReader.integer(UInt64.self, of: bytes, at: Self.checksumOffset)
    guard headerLength == UInt32(Self.length),
      Checksum.of(Array(bytes[..<Self.checksumOffset]), seed: 0) == checksum
    else {
      throw ImageError(.damaged, path, "the header does not match its checksum", fileOffset: 0)
    }
    fileLength = reader.next()
    id = ImageID(low: reader.next(), high: reader.next())
    regionCount = reader.next()
    stateCount = reader.next()
    metadataCount = reader.next()
    let blockSize: UInt32 = reader.next()
    regionTable = Self.table(&reader)
    stateTable = Self.table(&reader)
    metadata = Self.table(&reader)
    encoding = reader.next()
    blocksPerChunk = reader.next()
    ancestorCount = reader.next()
    let reserved: UInt32 = reader.next()
    ancestors = Self.table(&reader)
    chunkTableOffset = reader.next()
    chunkCount = reader.next()
    dataOffset = reader.next()
    dataLength = reader.next()
    contentID = ContentID(bytes: reader.next(count: ContentID.length))
    guard blockSize == UInt32(ImageLimits.blockSize) else {
      throw ImageError(.invalidLayout, path, "it has blocks of \(blockSize) bytes")
    }
    guard reserved == 0, bytes[Self.reservedStart..<Self.checksumOffset].allSatisfy({ $0 == 0 })
    else {
      throw ImageError(.invalidLayout, path, "reserved bytes of the header are not zero")
    }
    try checkLimits(path)
  }

  init(id: ImageID, fileLength: UInt64, regionCount: Int, stateCount: Int, metadataCount: Int) {
    self.id = id
    self.fileLength = fileLength
    self.regionCount = UInt32(regionCount)
    self.stateCount = UInt32(stateCount)
    self.metadataCount = UInt32(metadataCount)
  }

  private static func table(_ reader: inout ByteReader) -> TableReference {
    TableReference(offset: reader.next(), length: reader.next(), checksum: reader.next())
  }

  /// Everything that later decides how much is allocated.
  private func checkLimits(_ path: FilePath) throws(ImageError) {
    let limits: [(UInt64, Int, String)] = [
      (fileLength, ImageLimits.fileLength, "bytes"),
      (UInt64(regionCount), ImageLimits.regions, "regions"),
      (UInt64(stateCount), ImageLimits.states, "device states"),
      (UInt64(metadataCount), ImageLimits.metadataEntries, "metadata entries"),
      (metadata.length, ImageLimits.metadataBytes, "bytes of metadata"),
      (UInt64(blocksPerChunk), ImageLimits.blocksPerChunk, "blocks in a chunk"),
      (chunkCount, ImageLimits.chunks, "chunks"),
      (UInt64(ancestorCount), ImageLimits.ancestors, "ancestors"),
      (ancestors.length, ImageLimits.ancestorBytes, "bytes about ancestors"),
    ]
    for (value, limit, what) in limits where value > UInt64(limit) {
      throw ImageError(.limitExceeded, path, "it claims \(value) \(what), more than \(limit)")
    }
    guard regionCount > 0 else {
      throw ImageError(.invalidLayout, path, "it has no regions")
    }
    guard encoding <= 1, blocksPerChunk > 0, encoding == 1 || blocksPerChunk == 1 else {
      throw ImageError(
        .invalidLayout, path,
        "its encoding is \(encoding) with \(blocksPerChunk) blocks in a chunk")
    }
    guard encoding == 1 || dataLength == chunkCount * UInt64(ImageLimits.blockSize) else {
      throw ImageError(.invalidLayout, path, "its data are not \(chunkCount) blocks long")
    }
    guard
      regionTable.length == UInt64(regionCount) * UInt64(RegionEntry.length),
      stateTable.length == UInt64(stateCount) * UInt64(StateEntry.length)
    else {
      throw ImageError(.invalidLayout, path, "a table's length does not match its count")
    }
  }
}
