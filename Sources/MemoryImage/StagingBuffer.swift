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
  private var chunkLength = 0
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
    (chunkLength, encodedLength) = (0, 0)
    chunks.removeAll(keepingCapacity: true)
  }

  /// Adds a block to the chunk that is being collected.
  @unsafe func append(_ block: UnsafeRawPointer) {
    precondition(chunkLength < chunkRoom)
    // SAFETY: there is room, and `block` is one.
    unsafe (chunk.pointer + chunkLength).copyMemory(
      from: block, byteCount: ImageLimits.blockSize)
    chunkLength += ImageLimits.blockSize
  }

  /// The chunk that is being collected.
  @unsafe var collected: UnsafeRawPointer { unsafe UnsafeRawPointer(chunk.pointer) }

  /// Adds the collected chunk to the output, compressed where that makes it shorter; the
  /// bytes that it takes there. Their SHA-256 goes to `digest`.
  @unsafe func encode(
    length: Int, chunk number: Int, digest: UnsafeMutableRawPointer
  ) -> Int {
    precondition(encodedLength + length <= encoded.length)
    // SAFETY: chunk and output are mappings of this object, and the lengths were checked.
    let content = unsafe UnsafeRawBufferPointer(start: chunk.pointer, count: length)
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
    chunkLength = 0
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
