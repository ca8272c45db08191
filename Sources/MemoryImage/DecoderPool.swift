// SPDX-License-Identifier: Apache-2.0

internal import LinuxSystem
internal import Synchronization
internal import SystemPackage

/// What one thread needs to read a chunk, and the content of the chunk that it read last.
final class ChunkDecoder {
  let decompressor: ZstdDecompressor
  private let mapping: Mapping
  /// Bytes of a whole chunk's content, and at most of a frame.
  let contentRoom: Int
  let frameRoom: Int
  /// The chunk whose content is in `content`, checked; -1 for none.
  var chunk = -1
  /// Bytes of it.
  var contentLength = 0

  init(_ chunks: ChunkGeometry) throws(Errno) {
    contentRoom = chunks.blocksPerChunk * ImageLimits.blockSize
    // A frame that is longer than its content is not made; the content is stored then.
    frameRoom = contentRoom
    mapping = try Mapping(anonymous: contentRoom + frameRoom)
    guard let decompressor = ZstdDecompressor() else { throw .noMemory }
    self.decompressor = decompressor
  }

  /// Room for the content.
  var content: UnsafeMutableRawPointer { unsafe mapping.pointer }
  /// Room for the frame.
  var frame: UnsafeMutableRawPointer { unsafe mapping.pointer + contentRoom }
}

/// Decoders that no thread uses now. Taking one and giving it back takes no lock.
@safe
final class DecoderPool: @unchecked Sendable {
  // SAFETY: the slots are atomics; a decoder is in one slot or with one thread.

  /// More threads than that make decoders of their own, now and then.
  private static let slotCount = 64

  private let chunks: ChunkGeometry
  /// Each the bits of a retained `ChunkDecoder`, or 0.
  private let slots: UnsafeMutablePointer<Atomic<UInt>>

  /// A pool with two decoders, so that the first faults need not make one.
  init(_ chunks: ChunkGeometry) throws(Errno) {
    self.chunks = chunks
    unsafe slots = .allocate(capacity: Self.slotCount)
    for slot in 0..<Self.slotCount { unsafe (slots + slot).initialize(to: Atomic(0)) }
    guard !chunks.isStored else { return }
    for _ in 0..<2 { put(try ChunkDecoder(chunks)) }
  }

  deinit {
    while let decoder = take(from: 0..<Self.slotCount) { _ = decoder }
    unsafe slots.deinitialize(count: Self.slotCount)
    unsafe slots.deallocate()
  }

  /// Runs a body with a decoder that nobody else has.
  @inline(__always)
  func withDecoder<Value, Failure: Error>(
    noMemory: (Errno) -> Failure, _ body: (ChunkDecoder) throws(Failure) -> Value
  ) throws(Failure) -> Value {
    let decoder: ChunkDecoder
    if let free = take(from: 0..<Self.slotCount) {
      decoder = free
    } else {
      do throws(Errno) {
        decoder = try ChunkDecoder(chunks)
      } catch {
        throw noMemory(error)
      }
    }
    defer { put(decoder) }
    return try body(decoder)
  }

  private func take(from range: Range<Int>) -> ChunkDecoder? {
    for slot in range {
      let atomic = unsafe slots + slot
      guard unsafe atomic.pointee.load(ordering: .relaxed) != 0 else { continue }
      let bits = unsafe atomic.pointee.exchange(0, ordering: .acquiring)
      guard let pointer = unsafe UnsafeRawPointer(bitPattern: bits) else { continue }
      // SAFETY: `put` stored it retained, and the exchange made it ours alone.
      return unsafe Unmanaged<ChunkDecoder>.fromOpaque(pointer).takeRetainedValue()
    }
    return nil
  }

  private func put(_ decoder: ChunkDecoder) {
    let retained = unsafe Unmanaged.passRetained(decoder)
    let bits = unsafe UInt(bitPattern: retained.toOpaque())
    for slot in 0..<Self.slotCount {
      let (isStored, _) = unsafe (slots + slot).pointee.compareExchange(
        expected: 0, desired: bits, ordering: .releasing)
      if isStored { return }
    }
    unsafe retained.release()
  }
}
