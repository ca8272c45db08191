// SPDX-License-Identifier: Apache-2.0

internal import SystemPackage

/// The parts of a file, to find out whether they lie inside of it and apart.
struct ExtentSet {
  private struct Extent {
    let start: Int
    let end: Int
    let name: String
  }

  private let path: FilePath
  private let fileLength: Int
  private var extents: [Extent] = []

  init(path: FilePath, fileLength: Int) {
    self.path = path
    self.fileLength = fileLength
  }

  /// Adds a part; throws unless it lies inside of the file. When it returns, offset and
  /// length fit into `Int`, also summed.
  mutating func insert(offset: UInt64, length: UInt64, _ name: String) throws(ImageError) {
    let end = offset.addingReportingOverflow(length)
    guard !end.overflow, end.partialValue <= UInt64(fileLength) else {
      throw ImageError(.invalidLayout, path, "\(name) lies outside of the file")
    }
    // What is empty overlaps nothing.
    guard length > 0 else { return }
    extents.append(Extent(start: Int(offset), end: Int(end.partialValue), name: name))
  }

  /// Adds the index of a region whose length was checked.
  mutating func insert(_ entry: RegionEntry, number: Int) throws(ImageError) {
    let blockSize = UInt64(ImageLimits.blockSize)
    guard entry.indexOffset % blockSize == 0 else {
      throw ImageError(
        .invalidLayout, path, "its index is not aligned to 4 KiB", region: number,
        regionName: entry.name)
    }
    let blocks = Int(entry.length / blockSize)
    let indexLength = UInt64(RegionGeometry.indexPageCount(blockCount: blocks)) * blockSize
    try insert(
      offset: entry.indexOffset, length: indexLength, "the index of region \(number)")
  }

  /// Adds chunk table and data.
  mutating func insert(_ header: ImageHeader) throws(ImageError) {
    let blockSize = UInt64(ImageLimits.blockSize)
    guard header.chunkTableOffset % blockSize == 0, header.dataOffset % blockSize == 0 else {
      throw ImageError(
        .invalidLayout, path, "its chunk table or its data is not aligned to 4 KiB")
    }
    let pages = ChunkGeometry.tablePageCount(
      chunks: Int(header.chunkCount), isStored: header.encoding == 0)
    try insert(
      offset: header.chunkTableOffset, length: UInt64(pages) * blockSize, "the chunk table")
    try insert(offset: header.dataOffset, length: header.dataLength, "the data")
  }

  /// Throws when two parts share a byte.
  func checkDisjoint() throws(ImageError) {
    let ordered = extents.sorted { $0.start < $1.start }
    for (left, right) in zip(ordered, ordered.dropFirst()) where right.start < left.end {
      throw ImageError(
        .invalidLayout, path, "\(left.name) and \(right.name) overlap in the file",
        fileOffset: right.start)
    }
  }
}
