// SPDX-License-Identifier: Apache-2.0

internal import LinuxSystem
internal import SystemPackage

/// All of an image but its indexes and data: what opening reads and checks.
struct ImageCatalog {
  let id: ImageID
  /// What the file was when it was looked at.
  let status: FileStatus
  /// Bytes, without a working set.
  let fileLength: Int
  let regions: [ImageRegion]
  let geometries: [RegionGeometry]
  let states: [DeviceState]
  let metadata: [String: String]

  let chunks: ChunkGeometry
  let contentID: ContentID

  /// The oldest first.
  let ancestors: [ImageAncestor]

  /// Pages of the indexes of all regions.
  let indexPageCount: Int

  /// Reads and checks header, tables and device states. What it allocates is bounded
  /// by `ImageLimits`, whatever the file says.
  init(reading file: borrowing OwnedDescriptor, path: FilePath) throws(ImageError) {
    let status: FileStatus
    do throws(Errno) {
      status = try file.status
    } catch {
      throw ImageError(.inputOutput, path, "its length cannot be read", errno: error)
    }
    guard status.isRegular else {
      throw ImageError(.notAnImage, path, "it is not a regular file")
    }
    let source = TableSource(path: path, fileLength: status.length)
    let header = try ImageHeader(
      decoding: source.read(file, offset: 0, length: min(status.length, ImageHeader.length)),
      path: path)
    guard header.fileLength <= UInt64(status.length) else {
      throw ImageError(
        .truncated, path,
        "it has \(status.length) bytes of the \(header.fileLength) that were written")
    }
    // What follows is a working set, or what is left of one: `workingSet` looks at it.
    let written = Int(header.fileLength)
    var extents = ExtentSet(path: path, fileLength: written)
    try extents.insert(offset: 0, length: UInt64(ImageHeader.length), "the header")

    let table = try source.read(
      file, header.regionTable, seed: Checksum.key(header.id, .regionTable), "the region table",
      &extents)
    var reader = ByteReader(table)
    var regions: [ImageRegion] = []
    var geometries: [RegionGeometry] = []
    var indexPages = 0
    for number in 0..<Int(header.regionCount) {
      let entry = try RegionEntry(&reader, number: number, path: path)
      let region = try entry.region(number: number, path: path)
      try extents.insert(entry, number: number)
      let geometry = RegionGeometry(
        blockCount: region.blockCount, indexOffset: Int(entry.indexOffset),
        firstIndexPage: indexPages,
        indexKey: Checksum.key(header.id, .index, number: number))
      indexPages += geometry.indexPageCount
      regions.append(region)
      geometries.append(geometry)
    }
    try ImageRegion.check(regions, path: path)
    try extents.insert(header)
    chunks = ChunkGeometry(header)
    ancestors = try AncestorTable.decode(
      source.read(
        file, header.ancestors, seed: Checksum.key(header.id, .ancestors),
        "the table of ancestors", &extents),
      count: Int(header.ancestorCount), path: path)
    let numbers = ancestors.reduce(chunks.blockNumbers) { $0 + $1.blockNumbers }
    guard numbers < Int(UInt32.max) else {
      throw ImageError(.limitExceeded, path, "its chain has \(numbers) blocks")
    }

    let states = try source.readStates(file, header, &extents)
    let metadata = try MetadataTable.decode(
      source.read(
        file, header.metadata, seed: Checksum.key(header.id, .metadata), "the metadata", &extents),
      count: Int(header.metadataCount), path: path)
    try extents.checkDisjoint()

    id = header.id
    self.status = status
    fileLength = written
    self.regions = regions
    self.geometries = geometries
    self.states = states
    self.metadata = metadata
    contentID = header.contentID
    indexPageCount = indexPages
  }
}

extension RegionEntry {
  /// The entry as the caller sees it, its fields checked by themselves.
  fileprivate func region(number: Int, path: FilePath) throws(ImageError) -> ImageRegion {
    guard let length = Int(exactly: length), let bytes = Int(exactly: pageSize),
      let pageSize = PageSize(rawValue: bytes)
    else {
      throw ImageError(
        .invalidLayout, path, "its length or its page size is not one that memory has",
        region: number, regionName: name)
    }
    let region = ImageRegion(
      name: name, guestAddress: GuestAddress(guestAddress), length: length, pageSize: pageSize)
    try region.check(number: number, path: path)
    return region
  }
}

// MARK: - Reading tables

/// Reads checked tables of one image.
private struct TableSource {
  let path: FilePath
  let fileLength: Int

  /// The bytes of a table whose place was checked and whose checksum matches.
  func read(
    _ file: borrowing OwnedDescriptor, _ table: TableReference, seed: UInt64, _ what: String,
    _ extents: inout ExtentSet
  ) throws(ImageError) -> [UInt8] {
    try extents.insert(offset: table.offset, length: table.length, what)
    guard table.offset % 8 == 0 || table.length == 0 else {
      throw ImageError(.invalidLayout, path, "\(what) is not aligned")
    }
    let bytes = try read(file, offset: Int(table.offset), length: Int(table.length))
    guard Checksum.of(bytes, seed: seed) == table.checksum else {
      throw ImageError(
        .damaged, path, "\(what) does not match its checksum", fileOffset: Int(table.offset))
    }
    return bytes
  }

  /// Bytes at a checked place.
  func read(
    _ file: borrowing OwnedDescriptor, offset: Int, length: Int
  ) throws(ImageError) -> [UInt8] {
    var bytes = [UInt8](repeating: 0, count: length)
    let result = unsafe bytes.withUnsafeMutableBytes { buffer in
      Result { () throws(Errno) in
        // SAFETY: the buffer is valid for the closure and written within its bounds.
        try unsafe file.readAll(into: buffer, at: offset)
      }
    }
    if case .failure(let errno) = result {
      throw .reading(errno, path, fileOffset: offset)
    }
    return bytes
  }

  func readStates(
    _ file: borrowing OwnedDescriptor, _ header: ImageHeader, _ extents: inout ExtentSet
  ) throws(ImageError) -> [DeviceState] {
    let table = try read(
      file, header.stateTable, seed: Checksum.key(header.id, .stateTable),
      "the device-state table", &extents)
    var reader = ByteReader(table)
    var entries: [StateEntry] = []
    var names: Set<UInt64> = []
    var total = 0
    for number in 0..<Int(header.stateCount) {
      let entry = StateEntry(&reader)
      try extents.insert(offset: entry.offset, length: entry.length, "device state \(number)")
      // In range: `insert` has checked the length against the file's.
      total += Int(entry.length)
      guard total <= ImageLimits.stateBytes else {
        throw ImageError(
          .limitExceeded, path,
          "its device states take more than \(ImageLimits.stateBytes) bytes")
      }
      guard names.insert(UInt64(entry.type) << 32 | UInt64(entry.instance)).inserted,
        entry.offset % 8 == 0
      else {
        throw ImageError(.invalidLayout, path, "device state \(number) is doubled or not aligned")
      }
      entries.append(entry)
    }
    var states: [DeviceState] = []
    for (number, entry) in entries.enumerated() {
      let bytes = try read(file, offset: Int(entry.offset), length: Int(entry.length))
      let seed = Checksum.key(header.id, .state, number: number)
      guard Checksum.of(bytes, seed: seed) == entry.checksum else {
        throw ImageError(
          .damaged, path, "device state \(number) does not match its checksum",
          fileOffset: Int(entry.offset))
      }
      states.append(DeviceState(type: entry.type, instance: entry.instance, bytes: bytes))
    }
    return states
  }
}

extension ImageError {
  /// What a failed pread(2) means: bytes that should be there and are not are a cut file.
  static func reading(
    _ errno: Errno, _ path: FilePath, region: Int? = nil, regionName: String? = nil,
    block: Int? = nil, fileOffset: Int
  ) -> ImageError {
    guard errno == .noData else {
      return ImageError(
        .inputOutput, path, "it cannot be read", region: region, regionName: regionName,
        block: block, fileOffset: fileOffset, errno: errno)
    }
    return ImageError(
      .truncated, path, "the file ends too early", region: region, regionName: regionName,
      block: block, fileOffset: fileOffset)
  }
}
