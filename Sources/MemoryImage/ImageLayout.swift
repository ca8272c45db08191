// SPDX-License-Identifier: Apache-2.0

internal import SystemPackage

/// Where a writer puts the parts whose size is known from the start.
struct ImageLayout {
  let id: ImageID
  let regions: [ImageRegion]
  let geometries: [RegionGeometry]
  /// Pages of the indexes of all regions.
  let indexPageCount: Int
  /// The first byte after the data areas.
  let dataEnd: Int

  /// The region table follows the header.
  static let regionTableOffset = ImageHeader.length

  /// Checks the regions and places them.
  init(id: ImageID, regions: [ImageRegion], path: FilePath) throws(ImageError) {
    try ImageRegion.check(regions, path: path)
    let blockSize = ImageLimits.blockSize
    let tableEnd = Self.regionTableOffset + regions.count * RegionEntry.length
    let indexOffset = (tableEnd + blockSize - 1) & ~(blockSize - 1)
    // No overflow: at most 2^10 regions of at most 2^50 bytes.
    let indexPages = regions.reduce(0) {
      $0 + RegionGeometry.indexPageCount(blockCount: $1.blockCount)
    }
    var page = 0
    var dataOffset = indexOffset + indexPages * blockSize
    var geometries: [RegionGeometry] = []
    for (number, region) in regions.enumerated() {
      let geometry = RegionGeometry(
        blockCount: region.blockCount, indexOffset: indexOffset + page * blockSize,
        dataOffset: dataOffset, firstIndexPage: page,
        indexKey: Checksum.key(id, .index, number: number),
        dataKey: Checksum.key(id, .data, number: number))
      page += geometry.indexPageCount
      dataOffset += region.length
      geometries.append(geometry)
    }
    // Leaves room for what comes after the data.
    let rest = ImageLimits.stateBytes + ImageLimits.metadataBytes + ImageLimits.states * 64
    guard dataOffset <= ImageLimits.fileLength - rest else {
      throw ImageError(.limitExceeded, path, "its regions need a file of \(dataOffset) bytes")
    }
    self.id = id
    self.regions = regions
    self.geometries = geometries
    indexPageCount = indexPages
    dataEnd = dataOffset
  }

  /// The region table's bytes.
  func encodedRegionTable() -> [UInt8] {
    var bytes: [UInt8] = []
    for (region, geometry) in zip(regions, geometries) {
      RegionEntry(region, geometry).append(to: &bytes)
    }
    return bytes
  }
}

/// What comes after the data areas: blobs, their table, and the metadata.
struct ImageTail {
  /// The bytes from `ImageLayout.dataEnd` to the end of the file.
  private(set) var bytes: [UInt8] = []
  private(set) var stateTable = TableReference()
  private(set) var metadata = TableReference()

  /// Encodes the tail of a file; `offset` is where it will lie, a multiple of 8.
  init(id: ImageID, offset: Int, states: [DeviceState], metadata: [String: String]) {
    var table: [UInt8] = []
    for (number, state) in states.enumerated() {
      let checksum = Checksum.of(state.bytes, seed: Checksum.key(id, .state, number: number))
      StateEntry(state, offset: offset + bytes.count, checksum: checksum).append(to: &table)
      bytes.append(contentsOf: state.bytes)
      bytes.append(zeros: -bytes.count & 7)
    }
    stateTable = append(table, offset: offset, seed: Checksum.key(id, .stateTable))
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
