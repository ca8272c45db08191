// SPDX-License-Identifier: Apache-2.0

internal import LinuxSystem
internal import Synchronization
internal import SystemPackage

/// The file, the index in memory, and the staging buffers behind an `ImageWriter`.
final class BlockStore: @unchecked Sendable {
  // SAFETY: `file` and `isFailed` are guarded as said at each; the index's words are each
  // written by one thread at a time, which is the contract of `ImageBlockWriter`, and read
  // only under the exclusive lock.

  let path: FilePath
  let layout: ImageLayout

  /// Closes the race between a write on one thread and `finish` or `abandon` on another:
  /// writes share it, the end takes it alone.
  let lock = ReadWriteLock()
  /// The file while it can be written to. Changed only under the exclusive lock.
  var file: PendingFile?
  /// Whether a write failed, so that the file lacks blocks.
  let isFailed = Atomic(false)
  /// 512 words for each index page, as in the file; the checksums come last.
  let index: Mapping

  /// Buffers that no thread uses now. The lock is held to take one or to put it back.
  private let buffers = Mutex<[StagingBuffer]>([])

  init(path: FilePath, regions: [ImageRegion]) throws(ImageError) {
    self.path = path
    layout = try ImageLayout(id: .random(), regions: regions, path: path)
    do throws(Errno) {
      index = try Mapping(anonymous: layout.indexPageCount * ImageLimits.blockSize)
    } catch {
      throw ImageError(
        .limitExceeded, path, "there is no address space for its index", errno: error)
    }
    do throws(Errno) {
      let file = try PendingFile(at: path)
      // Also tells now, and not after hours, whether a file may be that large.
      try file.descriptor.setLength(layout.dataEnd)
      self.file = consume file
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
  func write(region: Int, firstBlock: Int, bytes: UnsafeRawBufferPointer) throws(ImageError) {
    guard layout.regions.indices.contains(region) else {
      throw ImageError(.outOfRange, path, "it has no region \(region)")
    }
    let geometry = layout.geometries[region]
    let blockSize = ImageLimits.blockSize
    guard bytes.count % blockSize == 0, firstBlock >= 0, firstBlock <= geometry.blockCount,
      bytes.count / blockSize <= geometry.blockCount - firstBlock
    else {
      throw ImageError(
        .outOfRange, path, "\(bytes.count) bytes are not blocks of the region", region: region,
        regionName: layout.regions[region].name, block: firstBlock)
    }
    let buffer = try takeBuffer()
    defer { buffers.withLock { $0.append(buffer) } }
    var done = 0
    while done < bytes.count {
      let length = min(bytes.count - done, StagingBuffer.length)
      // SAFETY: `length` bytes are left in the caller's buffer and fit into ours, which no
      // other thread has.
      let staged = unsafe buffer.fill(
        from: UnsafeRawBufferPointer(rebasing: bytes[done..<done + length]))
      let block = firstBlock + done / blockSize
      let isOpen: Bool
      do throws(Errno) {
        isOpen = try lock.read { () throws(Errno) in
          try unsafe store(staged, at: block, of: geometry)
        }
      } catch {
        isFailed.store(true, ordering: .relaxed)
        throw ImageError(
          .inputOutput, path, "memory cannot be written", region: region,
          regionName: layout.regions[region].name, block: block,
          fileOffset: geometry.offset(ofBlock: block), errno: error)
      }
      guard isOpen else { throw ImageError(.incomplete, path, "its writer has ended") }
      done += length
    }
  }

  /// Writes staged blocks, a call for each run of data, and enters them into the index.
  ///
  /// - Returns: `false`, with nothing written, when the writer has ended.
  @unsafe
  private func store(
    _ staged: UnsafeMutableRawBufferPointer, at firstBlock: Int, of geometry: RegionGeometry
  ) throws(Errno) -> Bool {
    let blockSize = ImageLimits.blockSize
    let count = staged.count / blockSize
    guard file != nil, let base = staged.baseAddress else { return false }
    var start = 0
    while start < count {
      var end = start
      while end < count {
        // SAFETY: block `end` lies inside of the staging buffer, which is page aligned.
        let bytes = unsafe base + end * blockSize
        let block = firstBlock + end
        if unsafe isZeroBlock(bytes) {
          unsafe entry(block, of: geometry).pointee = 0
          break
        }
        unsafe entry(block, of: geometry).pointee = unsafe Checksum.of(
          bytes, length: blockSize, seed: geometry.seed(ofBlock: block))
        end += 1
      }
      if end > start {
        let run = unsafe UnsafeRawBufferPointer(
          rebasing: staged[start * blockSize..<end * blockSize])
        let offset = geometry.offset(ofBlock: firstBlock + start)
        try unsafe file?.descriptor.writeAll(run, at: offset)
      }
      // The block that ended the run is zero.
      start = end + 1
    }
    return true
  }

  private func entry(
    _ block: Int, of geometry: RegionGeometry
  ) -> UnsafeMutablePointer<UInt64> {
    let (page, slot) = block.quotientAndRemainder(dividingBy: RegionGeometry.entriesPerPage)
    let offset = (geometry.firstIndexPage + page) * ImageLimits.blockSize + slot * 8
    // SAFETY: `block` is one of the region's, so the word lies in the mapping, which lives
    // as long as `self`.
    return unsafe (index.pointer + offset).assumingMemoryBound(to: UInt64.self)
  }

  func takeBuffer() throws(ImageError) -> StagingBuffer {
    if let buffer = buffers.withLock({ $0.popLast() }) { return buffer }
    do throws(Errno) {
      return try StagingBuffer()
    } catch {
      throw ImageError(.limitExceeded, path, "there is no memory to stage writes", errno: error)
    }
  }
}

/// Memory that blocks are copied to before they are looked at: what is hashed is what is
/// written, also when the guest runs on.
final class StagingBuffer: Sendable {
  /// Bytes.
  static let length = 1 << 20

  private let mapping: Mapping

  init() throws(Errno) { mapping = try Mapping(anonymous: Self.length) }

  /// Copies at most `length` bytes; the result is valid until the next call and as long as
  /// `self`.
  @unsafe func fill(from bytes: UnsafeRawBufferPointer) -> UnsafeMutableRawBufferPointer {
    // SAFETY: the mapping is `length` bytes, and `bytes` is no longer.
    let room = unsafe UnsafeMutableRawBufferPointer(start: mapping.pointer, count: bytes.count)
    unsafe room.copyMemory(from: bytes)
    return unsafe room
  }
}
