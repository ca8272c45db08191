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
        try writeIndex(to: file.descriptor, through: buffer)
        try writeTables(to: file.descriptor, states: states, metadata: metadata)
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

  /// Writes the index pages with their checksums, through a staging buffer: the pages of
  /// an untouched index stay without memory.
  private func writeIndex(
    to file: borrowing OwnedDescriptor, through buffer: StagingBuffer
  ) throws(Errno) {
    let blockSize = ImageLimits.blockSize
    let length = RegionGeometry.entriesPerPage * 8
    for geometry in layout.geometries {
      var first = 0
      while first < geometry.indexPageCount {
        let count = min(geometry.indexPageCount - first, StagingBuffer.length / blockSize)
        // SAFETY: the pages lie in the mapping, which lives as long as `self`, and no other
        // thread is writing: the caller holds the lock alone.
        let staged = unsafe buffer.fill(
          from: UnsafeRawBufferPointer(
            start: index.pointer + (geometry.firstIndexPage + first) * blockSize,
            count: count * blockSize))
        for number in 0..<count {
          let page = unsafe UnsafeMutableRawBufferPointer(
            rebasing: staged[number * blockSize..<(number + 1) * blockSize])
          let checksum = unsafe Checksum.of(
            UnsafeRawBufferPointer(rebasing: page[..<length]),
            seed: geometry.seed(ofIndexPage: first + number))
          unsafe page.storeBytes(of: checksum, toByteOffset: length, as: UInt64.self)
        }
        try unsafe file.writeAll(
          UnsafeRawBufferPointer(staged), at: geometry.offset(ofIndexPage: first))
        first += count
      }
    }
  }

  /// Tables and tail; then, when all is on stable storage, the header.
  private func writeTables(
    to file: borrowing OwnedDescriptor, states: [DeviceState], metadata: [String: String]
  ) throws(Errno) {
    let regionTable = layout.encodedRegionTable()
    try file.write(regionTable, at: ImageLayout.regionTableOffset)
    let tail = ImageTail(
      id: layout.id, offset: layout.dataEnd, states: states, metadata: metadata)
    try file.write(tail.bytes, at: layout.dataEnd)
    try file.synchronize()

    var header = ImageHeader(
      id: layout.id, fileLength: UInt64(layout.dataEnd + tail.bytes.count),
      regionCount: layout.regions.count, stateCount: states.count, metadataCount: metadata.count)
    header.regionTable = TableReference(
      offset: UInt64(ImageLayout.regionTableOffset), length: UInt64(regionTable.count),
      checksum: Checksum.of(regionTable, seed: Checksum.key(layout.id, .regionTable)))
    header.stateTable = tail.stateTable
    header.metadata = tail.metadata
    try file.write(header.encoded(), at: 0)
    try file.synchronize()
  }
}

extension OwnedDescriptor {
  /// Writes all bytes of an array at an offset.
  fileprivate borrowing func write(_ bytes: [UInt8], at offset: Int) throws(Errno) {
    let result = unsafe bytes.withUnsafeBytes { buffer in
      Result { () throws(Errno) in
        // SAFETY: the buffer is valid for the closure.
        try unsafe writeAll(buffer, at: offset)
      }
    }
    try result.get()
  }
}
