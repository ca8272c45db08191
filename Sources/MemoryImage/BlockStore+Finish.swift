// SPDX-License-Identifier: Apache-2.0

internal import LinuxSystem
internal import Synchronization
internal import SystemPackage

extension BlockStore {
  /// Writes what is missing, makes it durable, and gives the file its name.
  func finish(states: [DeviceState], metadata: [String: String]) throws(ImageError) {
    // Alone: a write on another thread either is in the image or throws.
    try lock.write { () throws(ImageError) in
      guard let file = file.take() else {
        throw ImageError(.incomplete, path, "its writer has ended")
      }
      guard !isFailed.load(ordering: .relaxed) else {
        throw ImageError(.incomplete, path, "memory could not be written before")
      }
      let buffer = try takeBuffer()
      let directory: OwnedDescriptor
      do throws(Errno) {
        try writeRest(of: file.descriptor, through: buffer, states: states, metadata: metadata)
        directory = try file.publish()
      } catch {
        throw ImageError(
          .inputOutput, path, "it cannot be completed; what was there is unchanged", errno: error)
      }
      do throws(Errno) {
        try directory.synchronize()
      } catch {
        throw ImageError(
          .inputOutput, path, "it is complete and in place, but its directory cannot be synced",
          errno: error)
      }
    }
  }

  /// Index, tables and tail; then, when all is on stable storage, the header.
  private func writeRest(
    of file: borrowing OwnedDescriptor, through buffer: StagingBuffer, states: [DeviceState],
    metadata: [String: String]
  ) throws(Errno) {
    guard let hasher = SHA256Hasher() else { throw .noMemory }
    let blockSize = ImageLimits.blockSize
    let chunkCount = chunkCount.load(ordering: .relaxed)
    let isStored = options.encoding == .stored
    let dataLength =
      isStored ? chunkCount * blockSize : self.dataLength.load(ordering: .relaxed)
    let indexOffset = (layout.dataOffset + dataLength + blockSize - 1) & ~(blockSize - 1)
    let chunkTableOffset = indexOffset + layout.indexPageCount * blockSize
    let tablePages = ChunkGeometry.tablePageCount(chunks: chunkCount, isStored: isStored)
    let tailOffset = chunkTableOffset + tablePages * blockSize

    let regionTable = layout.encodedRegionTable(indexOffset: indexOffset)
    let ancestors = chain()
    let tail = ImageTail(
      id: layout.id, offset: tailOffset, states: states, ancestors: ancestors, metadata: metadata)
    var header = ImageHeader(
      id: layout.id, fileLength: UInt64(tailOffset + tail.bytes.count),
      regionCount: layout.regions.count, stateCount: states.count, metadataCount: metadata.count)
    header.regionTable = TableReference(
      offset: UInt64(ImageLayout.regionTableOffset), length: UInt64(regionTable.count),
      checksum: Checksum.of(regionTable, seed: Checksum.key(layout.id, .regionTable)))
    header.stateTable = tail.stateTable
    header.metadata = tail.metadata
    header.encoding = isStored ? 0 : 1
    header.blocksPerChunk = UInt32(options.blocksPerChunk)
    header.ancestorCount = UInt32(ancestors.count)
    header.ancestors = tail.ancestors
    header.chunkTableOffset = UInt64(chunkTableOffset)
    header.chunkCount = UInt64(chunkCount)
    header.dataOffset = UInt64(layout.dataOffset)
    header.dataLength = UInt64(dataLength)

    // In the order of docs/image-format.md, "Content id".
    hasher.addPart(header.countsForContentID)
    hasher.addPart(regionTable)
    hasher.addPart(AncestorTable.encode(ancestors))
    hasher.addLength(chunkCount * ContentID.length)
    // SAFETY: the digests of all chunks lie in the mapping.
    unsafe hasher.add(
      UnsafeRawBufferPointer(start: digests.pointer, count: chunkCount * ContentID.length))
    try writeIndex(to: file, at: indexOffset, through: buffer, hasher)
    for state in states { hasher.addPart(state.bytes) }
    hasher.addPart(MetadataTable.encode(metadata))
    header.contentID = hasher.finish()

    try writeChunkTable(
      to: file, at: chunkTableOffset, chunks: chunkCount, isStored: isStored, through: buffer)
    try file.writeAll(regionTable, at: ImageLayout.regionTableOffset)
    try file.writeAll(tail.bytes, at: tailOffset)
    // Also where the last blocks are holes.
    try file.setLength(tailOffset + tail.bytes.count)
    try file.synchronize()
    try file.writeAll(header.encoded(), at: 0)
    try file.synchronize()
  }

  /// Writes the index pages with their checksums, through a staging buffer: the pages of
  /// an untouched index stay without memory.
  private func writeIndex(
    to file: borrowing OwnedDescriptor, at offset: Int, through buffer: StagingBuffer,
    _ hasher: SHA256Hasher
  ) throws(Errno) {
    let blockSize = ImageLimits.blockSize
    hasher.addLength(layout.indexPageCount * (blockSize - 8))
    for geometry in layout.geometries {
      var first = 0
      while first < geometry.indexPageCount {
        let count = min(geometry.indexPageCount - first, StagingBuffer.length / blockSize)
        // SAFETY: the pages lie in the mapping, which lives as long as `self`, and no other
        // thread is writing: the caller holds the lock alone.
        unsafe buffer.fill(
          from: UnsafeRawBufferPointer(
            start: index.pointer + (geometry.firstIndexPage + first) * blockSize,
            count: count * blockSize))
        for number in 0..<count {
          let page = unsafe buffer.scratch + number * blockSize
          unsafe hasher.add(UnsafeRawBufferPointer(start: page, count: blockSize - 8))
          unsafe seal(page, seed: geometry.seed(ofIndexPage: first + number))
        }
        let pages = unsafe UnsafeRawBufferPointer(start: buffer.scratch, count: count * blockSize)
        try unsafe file.writeAll(
          pages, at: offset + geometry.offset(ofIndexPage: first))
        first += count
      }
    }
  }

  /// Writes the pages of the chunk table from the words in memory.
  private func writeChunkTable(
    to file: borrowing OwnedDescriptor, at offset: Int, chunks: Int, isStored: Bool,
    through buffer: StagingBuffer
  ) throws(Errno) {
    let blockSize = ImageLimits.blockSize
    let key = Checksum.key(layout.id, .chunkTable)
    let entries = ChunkGeometry.entriesPerPage(isStored: isStored)
    for page in 0..<ChunkGeometry.tablePageCount(chunks: chunks, isStored: isStored) {
      // SAFETY: a page fits into the scratch, whose only user we are.
      let words = unsafe buffer.scratch.bindMemory(to: UInt64.self, capacity: blockSize / 8)
      unsafe words.update(repeating: 0, count: blockSize / 8)
      for slot in 0..<min(entries, chunks - page * entries) {
        let entry = unsafe tableEntry(page * entries + slot)
        if isStored {
          unsafe words[slot] = entry[1]
        } else {
          unsafe words[slot * 2] = entry[0]
          unsafe words[slot * 2 + 1] = entry[1]
        }
      }
      unsafe seal(buffer.scratch, seed: Checksum.seed(key, position: page))
      try unsafe file.writeAll(
        UnsafeRawBufferPointer(start: buffer.scratch, count: blockSize),
        at: offset + page * blockSize)
    }
  }

  /// Puts a page's checksum at its end.
  @unsafe private func seal(_ page: UnsafeMutableRawPointer, seed: UInt64) {
    let length = ImageLimits.blockSize - 8
    // SAFETY: the caller vouches for 4096 bytes.
    let checksum = unsafe Checksum.of(UnsafeRawPointer(page), length: length, seed: seed)
    unsafe page.storeBytes(of: checksum, toByteOffset: length, as: UInt64.self)
  }
}

extension ImageHeader {
  /// Bytes 40 to 55 and 128 to 143: what the content id takes from the header.
  var countsForContentID: [UInt8] {
    let bytes = encoded()
    return Array(bytes[40..<56]) + Array(bytes[128..<144])
  }
}
