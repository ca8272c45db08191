// SPDX-License-Identifier: Apache-2.0

internal import LinuxSystem
internal import SystemPackage

/// What one thread needs to encode blocks. Blocks are copied to it before they are looked
/// at: what is hashed is what is written, also when the guest runs on.
final class StagingBuffer: @unchecked Sendable {
  // SAFETY: whoever takes it out of the pool is its only user until it goes back.

  /// Bytes of blocks that are staged at a time.
  static let length = 1 << 20

  private let staged: Mapping
  private let chunk: Mapping
  private let encoded: Mapping
  private let compared: Mapping
  private let compressor: ZstdCompressor?
  private let hasher: SHA256Hasher
  private let chunkRoom: Int
  /// The staged blocks of the chunk that is being collected.
  private var chunkBlocks: [Int] = []
  private var encodedLength = 0
  /// The chunks in the output, in their order.
  private(set) var chunks: [Int] = []

  init(_ options: ImageOptions) throws(Errno) {
    chunkRoom = options.blocksPerChunk * ImageLimits.blockSize
    staged = try Mapping(anonymous: Self.length)
    chunk = try Mapping(anonymous: chunkRoom)
    compared = try Mapping(anonymous: ImageLimits.blockSize)
    // A frame never is longer than its content: it is stored then.
    encoded = try Mapping(anonymous: Self.length + chunkRoom)
    guard let hasher = SHA256Hasher() else { throw .noMemory }
    self.hasher = hasher
    switch options.encoding {
    case .stored: compressor = nil
    case .zstd(let level):
      guard let compressor = ZstdCompressor(level: level) else { throw .noMemory }
      self.compressor = compressor
    }
  }

  /// Copies at most `length` bytes.
  @unsafe func fill(from bytes: UnsafeRawBufferPointer) {
    // SAFETY: the mapping is `length` bytes, and `bytes` is no longer.
    let room = unsafe UnsafeMutableRawBufferPointer(start: staged.pointer, count: bytes.count)
    unsafe room.copyMemory(from: bytes)
  }

  /// A staged block.
  @unsafe func block(_ index: Int) -> UnsafeRawPointer {
    unsafe UnsafeRawPointer(staged.pointer + index * ImageLimits.blockSize)
  }

  /// Empties the output.
  func beginOutput() {
    encodedLength = 0
    chunkBlocks.removeAll(keepingCapacity: true)
    chunks.removeAll(keepingCapacity: true)
  }

  /// Adds a staged block to the chunk that is being collected.
  func append(_ index: Int) { chunkBlocks.append(index) }

  /// The chunk that is being collected: most often as it is staged, for its blocks follow each
  /// other.
  @unsafe func collected() -> UnsafeRawBufferPointer {
    let count = chunkBlocks.count * ImageLimits.blockSize
    precondition(count > 0 && count <= chunkRoom)
    if chunkBlocks[chunkBlocks.count - 1] - chunkBlocks[0] == chunkBlocks.count - 1 {
      // SAFETY: blocks of the staging buffer, in a row.
      return unsafe UnsafeRawBufferPointer(start: block(chunkBlocks[0]), count: count)
    }
    for (place, index) in chunkBlocks.enumerated() {
      // SAFETY: a chunk has room for its blocks.
      unsafe (chunk.pointer + place * ImageLimits.blockSize).copyMemory(
        from: block(index), byteCount: ImageLimits.blockSize)
    }
    return unsafe UnsafeRawBufferPointer(start: chunk.pointer, count: count)
  }

  /// Adds the content of the collected chunk to the output, compressed where that makes it
  /// shorter; the bytes that it takes there. Their SHA-256 goes to `digest`.
  @unsafe func encode(
    _ content: UnsafeRawBufferPointer, chunk number: Int, digest: UnsafeMutableRawPointer
  ) -> Int {
    let length = content.count
    precondition(encodedLength + length <= encoded.length)
    // SAFETY: the output is a mapping of this object, and the length was checked.
    let room = unsafe UnsafeMutableRawBufferPointer(
      start: encoded.pointer + encodedLength, count: length)
    var stored = length
    // A multiple of the block size would read as content.
    if let compressor, let frame = unsafe compressor.compress(content, into: room),
      frame < length, frame % ImageLimits.blockSize != 0
    {
      stored = frame
    } else {
      unsafe room.copyMemory(from: content)
    }
    unsafe hasher.add(UnsafeRawBufferPointer(rebasing: room[..<stored]))
    unsafe hasher.finish(into: digest)
    encodedLength += stored
    chunkBlocks.removeAll(keepingCapacity: true)
    chunks.append(number)
    return stored
  }

  /// The encoded chunks.
  var output: UnsafeRawBufferPointer {
    unsafe UnsafeRawBufferPointer(start: encoded.pointer, count: encodedLength)
  }

  /// Room for a block to compare with.
  @unsafe var comparison: UnsafeMutableRawPointer { unsafe compared.pointer }

  /// Room to prepare other parts of the file in: `length` bytes.
  @unsafe var scratch: UnsafeMutableRawPointer { unsafe staged.pointer }
}
