// SPDX-License-Identifier: Apache-2.0

internal import LinuxSystem
internal import Synchronization
internal import SystemPackage

/// The file, index and chunk table in memory, and the staging buffers behind an
/// `ImageWriter`.
final class BlockStore: @unchecked Sendable {
  // SAFETY: `file`, `isFailed` and `knowsParent` are guarded as said at each; the words of index and
  // table are each written by one thread at a time (the index by the contract of
  // `ImageBlockWriter`, the table because a chunk's number is given out once), and read only
  // under the exclusive lock.

  let path: FilePath
  let layout: ImageLayout
  let options: ImageOptions
  let parent: MemoryImage?
  /// The number of the first own block in the chain.
  let base: Int

  /// Closes the race between a write on one thread and `finish` or `abandon` on another:
  /// writes share it, the end takes it alone.
  let lock = ReadWriteLock()
  /// The file while it can be written to. Changed only under the exclusive lock.
  var file: PendingFile?
  /// Whether a write failed, so that the file lacks blocks.
  let isFailed = Atomic(false)
  /// 1022 entries of 4 bytes for each index page, as in the file; the checksums come last.
  let index: Mapping
  /// 16 bytes for each chunk: place and checksum.
  let table: Mapping
  /// 32 bytes for each chunk: SHA-256 of its bytes in the file.
  let digests: Mapping
  /// Chunks that were given out, and bytes of data.
  let chunkCount = Atomic<Int>(0)
  let dataLength = Atomic<Int>(0)

  let known: KnownBlocks
  /// Whether the parent's blocks are among the known ones. Changed only before the first write.
  var knowsParent = false
  /// Buffers that no thread uses now. The lock is held to take one or to put it back.
  private let buffers = Mutex<[StagingBuffer]>([])

  init(
    path: FilePath, regions: [ImageRegion], options: ImageOptions, parent: MemoryImage?
  ) throws(ImageError) {
    self.path = path
    self.options = options
    self.parent = parent
    base = parent.map { $0.own.base + $0.own.chunks.blockNumbers } ?? 0
    layout = try ImageLayout(id: .random(), regions: regions, options: options, path: path)
    do throws(Errno) {
      index = try Mapping(anonymous: layout.indexPageCount * ImageLimits.blockSize)
      table = try Mapping(anonymous: (layout.chunkCapacity * 16 + 4095) & ~4095)
      digests = try Mapping(anonymous: (layout.chunkCapacity * 32 + 4095) & ~4095)
      // Memory that is not touched costs nothing, so there is room for a parent's that is searched.
      let blocks = layout.geometries.reduce(0) { $0 + $1.blockCount }
      known = try KnownBlocks(blocks: parent == nil ? blocks : 2 * blocks)
    } catch {
      throw ImageError(
        .limitExceeded, path, "there is no address space for its index", errno: error)
    }
    do throws(Errno) {
      file = try PendingFile(at: path)
    } catch {
      throw ImageError(.inputOutput, path, "it cannot be created", errno: error)
    }
  }

  /// Frees the file; later writes throw.
  func abandon() {
    lock.write { file = nil }
  }

  // MARK: - Blocks

  /// See `ImageBlockWriter.write`.
  @unsafe
  func write(
    region: Int, blocks: BlockNumbers, bytes: UnsafeRawBufferPointer
  ) throws(ImageError) {
    guard layout.regions.indices.contains(region) else {
      throw ImageError(.outOfRange, path, "it has no region \(region)")
    }
    let geometry = layout.geometries[region]
    let blockSize = ImageLimits.blockSize
    guard bytes.count % blockSize == 0,
      blocks.fit(bytes.count / blockSize, in: geometry.blockCount)
    else {
      throw ImageError(
        .outOfRange, path, "\(bytes.count) bytes are not blocks of the region", region: region,
        regionName: layout.regions[region].name, block: blocks.first)
    }
    let buffer = try takeBuffer()
    defer { buffers.withLock { $0.append(buffer) } }
    var done = 0
    while done < bytes.count {
      let length = min(bytes.count - done, StagingBuffer.length)
      // SAFETY: `length` bytes are left in the caller's buffer and fit into ours, which no
      // other thread has.
      unsafe buffer.fill(from: UnsafeRawBufferPointer(rebasing: bytes[done..<done + length]))
      let part = blocks.dropFirst(done / blockSize)
      let isOpen: Bool
      do throws(Errno) {
        isOpen = try lock.read { () throws(Errno) in
          try store(buffer, count: length / blockSize, at: part, of: geometry, region: region)
        }
      } catch {
        isFailed.store(true, ordering: .relaxed)
        throw ImageError(
          .inputOutput, path, "memory cannot be written", region: region,
          regionName: layout.regions[region].name, block: part.first, errno: error)
      }
      guard isOpen else { throw ImageError(.incomplete, path, "its writer has ended") }
      done += length
    }
  }

  /// Sorts staged blocks into zero, known and new ones, writes the new ones in chunks, and
  /// enters all into the index.
  ///
  /// - Returns: `false`, with nothing written, when the writer has ended.
  private func store(
    _ buffer: StagingBuffer, count: Int, at blocks: BlockNumbers, of geometry: RegionGeometry,
    region: Int
  ) throws(Errno) -> Bool {
    guard file != nil else { return false }
    var chunk = -1
    var filled = 0
    buffer.beginOutput()
    // Blocks that are stored as they are get numbers that follow each other, so that they
    // are written together; the numbers of those that turn out known stay unused.
    var reserved = 0..<0
    if options.encoding == .stored {
      // SAFETY: as below.
      reserved = try takeChunks(
        (0..<count).count { !(unsafe isZeroBlock(unsafe buffer.block($0))) })
    }
    for index in 0..<count {
      // SAFETY: block `index` lies inside of the staging buffer, which is page aligned.
      let bytes = unsafe buffer.block(index)
      let entry = unsafe entry(blocks[index], of: geometry)
      if unsafe isZeroBlock(bytes) {
        unsafe entry.pointee = 0
        continue
      }
      if !knowsParent,
        let inherited = unsafe parentEntry(
          region: region, block: blocks[index], equalTo: bytes, buffer)
      {
        unsafe entry.pointee = inherited
        continue
      }
      if chunk < 0 {
        if reserved.isEmpty { reserved = try takeChunks(1) }
        chunk = reserved.removeFirst()
        filled = 0
      }
      let number = UInt32(base + chunk * options.blocksPerChunk + filled)
      let same = unsafe known.number(of: bytes, orEnter: number)
      unsafe entry.pointee = same + 1
      if same != number { continue }
      buffer.append(index)
      filled += 1
      if filled == options.blocksPerChunk {
        close(chunk, buffer)
        chunk = -1
      }
    }
    if chunk >= 0, filled > 0 { close(chunk, buffer) }
    try writeOut(buffer)
    return true
  }

  private func takeChunks(_ count: Int) throws(Errno) -> Range<Int> {
    let first = chunkCount.wrappingAdd(count, ordering: .relaxed).oldValue
    guard first + count <= layout.chunkCapacity else { throw .fileTooLarge }
    return first..<first + count
  }

  /// Encodes a chunk that the buffer has collected into its output.
  private func close(_ chunk: Int, _ buffer: StagingBuffer) {
    let content = unsafe buffer.collected()
    let checksum = unsafe Checksum.of(content, seed: layout.seed(ofChunk: chunk))
    // SAFETY: `takeChunks` keeps numbers below the capacity.
    let stored = unsafe buffer.encode(
      content, chunk: chunk, digest: digests.pointer + chunk * ContentID.length)
    let entry = unsafe tableEntry(chunk)
    unsafe entry[0] = UInt64(stored)
    unsafe entry[1] = checksum
  }

  /// Writes the output in one call, and enters its chunks' places.
  private func writeOut(_ buffer: StagingBuffer) throws(Errno) {
    let output = unsafe buffer.output
    guard output.count > 0 else { return }
    if case .stored = options.encoding {
      // The place follows from the number.
      let blockSize = ImageLimits.blockSize
      var first = 0
      while first < buffer.chunks.count {
        var end = first + 1
        while end < buffer.chunks.count,
          buffer.chunks[end] == buffer.chunks[first] + end - first
        { end += 1 }
        try unsafe file?.descriptor.writeAll(
          UnsafeRawBufferPointer(rebasing: output[first * blockSize..<end * blockSize]),
          at: layout.dataOffset + buffer.chunks[first] * blockSize)
        first = end
      }
      return
    }
    var offset = dataLength.wrappingAdd(output.count, ordering: .relaxed).oldValue
    try unsafe file?.descriptor.writeAll(
      UnsafeRawBufferPointer(output), at: layout.dataOffset + offset)
    writeOut(behind: offset..<offset + output.count)
    for chunk in buffer.chunks {
      let entry = unsafe tableEntry(chunk)
      let length = unsafe Int(entry[0])
      unsafe entry[0] = ChunkEntry(offset: offset, length: length, checksum: 0).place
      offset += length
    }
  }

  /// Has the storage busy while the processors are: what lies a step behind the end is written
  /// out now, by whoever passes a step. Other threads may still be writing next to it.
  private func writeOut(behind written: Range<Int>) {
    let step = written.upperBound / Self.writebackStep
    guard step > written.lowerBound / Self.writebackStep, step > 1 else { return }
    let start = layout.dataOffset + (step - 2) * Self.writebackStep
    file?.descriptor.beginWriteback(of: start..<start + Self.writebackStep)
  }

  /// Bytes that are written out together.
  private static let writebackStep = 16 << 20

  func entry(
    _ block: Int, of geometry: RegionGeometry
  ) -> UnsafeMutablePointer<UInt32> {
    let (page, slot) = block.quotientAndRemainder(dividingBy: RegionGeometry.entriesPerPage)
    let offset = (geometry.firstIndexPage + page) * ImageLimits.blockSize + slot * 4
    // SAFETY: `block` is one of the region's, so the word lies in the mapping, which lives
    // as long as `self`.
    return unsafe (index.pointer + offset).assumingMemoryBound(to: UInt32.self)
  }

  /// Two words: the place (or its length, until it is known), and the checksum.
  func tableEntry(_ chunk: Int) -> UnsafeMutablePointer<UInt64> {
    // SAFETY: `takeChunks` keeps numbers below the capacity.
    unsafe (table.pointer + chunk * 16).assumingMemoryBound(to: UInt64.self)
  }

  func takeBuffer() throws(ImageError) -> StagingBuffer {
    if let buffer = buffers.withLock({ $0.popLast() }) { return buffer }
    do throws(Errno) {
      return try StagingBuffer(options)
    } catch {
      throw ImageError(.limitExceeded, path, "there is no memory to stage writes", errno: error)
    }
  }
}

/// The places of blocks that are written in one call.
enum BlockNumbers {
  /// One after the other.
  case from(Int)
  /// Anywhere.
  case some([Int])

  subscript(index: Int) -> Int {
    switch self {
    case .from(let first): first + index
    case .some(let blocks): blocks[index]
    }
  }

  /// Of the first block, for errors.
  var first: Int {
    switch self {
    case .from(let first): first
    case .some(let blocks): blocks.first ?? 0
    }
  }

  /// Those of the blocks that are left when some were dealt with.
  func dropFirst(_ count: Int) -> BlockNumbers {
    switch self {
    case .from(let first): .from(first + count)
    case .some(let blocks): count == 0 ? self : .some(Array(blocks.dropFirst(count)))
    }
  }

  /// Whether these are the places of `count` blocks of a region.
  func fit(_ count: Int, in blockCount: Int) -> Bool {
    switch self {
    case .from(let first): first >= 0 && first <= blockCount && count <= blockCount - first
    case .some(let blocks):
      blocks.count == count && blocks.allSatisfy { $0 >= 0 && $0 < blockCount }
    }
  }
}
