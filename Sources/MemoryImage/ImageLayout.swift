// SPDX-License-Identifier: Apache-2.0

internal import SystemPackage

/// Where a writer puts the parts whose size is known from the start.
struct ImageLayout {
  let id: ImageID
  let regions: [ImageRegion]
  /// Their index offsets count from the beginning of the index.
  let geometries: [RegionGeometry]
  /// Pages of the indexes of all regions.
  let indexPageCount: Int
  /// Bytes from the start of the file to the data.
  let dataOffset: Int
  /// Chunks that can be given out: enough for each block to be written twice alone.
  let chunkCapacity: Int
  private let chunkKey: UInt64

  /// The region table follows the header.
  static let regionTableOffset = ImageHeader.length

  /// Checks the regions and places them.
  init(
    id: ImageID, regions: [ImageRegion], options: ImageOptions, path: FilePath
  ) throws(ImageError) {
    try ImageRegion.check(regions, path: path)
    let blockSize = ImageLimits.blockSize
    guard (1...ImageLimits.blocksPerChunk).contains(options.blocksPerChunk) else {
      throw ImageError(
        .limitExceeded, path, "a chunk has 1 to \(ImageLimits.blocksPerChunk) blocks")
    }
    let tableEnd = Self.regionTableOffset + regions.count * RegionEntry.length
    var page = 0
    var geometries: [RegionGeometry] = []
    for (number, region) in regions.enumerated() {
      let geometry = RegionGeometry(
        blockCount: region.blockCount, indexOffset: page * blockSize, firstIndexPage: page,
        indexKey: Checksum.key(id, .index, number: number))
      page += geometry.indexPageCount
      geometries.append(geometry)
    }
    // No overflow: at most 2^10 regions of at most 2^50 bytes.
    let blocks = regions.reduce(0) { $0 + $1.blockCount }
    guard blocks * options.blocksPerChunk < Int(UInt32.max) / 2 else {
      throw ImageError(.limitExceeded, path, "its regions have \(blocks) blocks of 4 KiB")
    }
    self.id = id
    self.regions = regions
    self.geometries = geometries
    indexPageCount = page
    dataOffset = (tableEnd + blockSize - 1) & ~(blockSize - 1)
    chunkCapacity = 2 * blocks + 64
    chunkKey = Checksum.key(id, .chunk)
  }

  func seed(ofChunk chunk: Int) -> UInt64 { Checksum.seed(chunkKey, position: chunk) }

  /// The region table's bytes, for an index that begins at an offset.
  func encodedRegionTable(indexOffset: Int) -> [UInt8] {
    var bytes: [UInt8] = []
    for (region, geometry) in zip(regions, geometries) {
      RegionEntry(region, indexOffset: indexOffset + geometry.indexOffset).append(to: &bytes)
    }
    return bytes
  }
}

/// What comes after the chunk table: blobs, their table, and the metadata.
struct ImageTail {
  /// The bytes from the end of the chunk table to the end of the file.
  private(set) var bytes: [UInt8] = []
  private(set) var stateTable = TableReference()
  private(set) var ancestors = TableReference()
  private(set) var metadata = TableReference()

  /// Encodes the tail of a file; `offset` is where it will lie, a multiple of 8.
  init(
    id: ImageID, offset: Int, states: [DeviceState], ancestors: [ImageAncestor],
    metadata: [String: String]
  ) {
    var table: [UInt8] = []
    for (number, state) in states.enumerated() {
      let checksum = Checksum.of(state.bytes, seed: Checksum.key(id, .state, number: number))
      StateEntry(state, offset: offset + bytes.count, checksum: checksum).append(to: &table)
      bytes.append(contentsOf: state.bytes)
      bytes.append(zeros: -bytes.count & 7)
    }
    stateTable = append(table, offset: offset, seed: Checksum.key(id, .stateTable))
    self.ancestors = append(
      AncestorTable.encode(ancestors), offset: offset, seed: Checksum.key(id, .ancestors))
    // The entries' lengths are multiples of 8, those of the metadata are not: it comes last.
    self.metadata = append(
      MetadataTable.encode(metadata), offset: offset, seed: Checksum.key(id, .metadata))
  }

  private mutating func append(_ table: [UInt8], offset: Int, seed: UInt64) -> TableReference {
    defer { bytes.append(contentsOf: table) }
    return TableReference(
      offset: UInt64(offset + bytes.count), length: UInt64(table.count),
      checksum: Checksum.of(table, seed: seed))
  }
}
