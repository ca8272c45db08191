// SPDX-License-Identifier: Apache-2.0

internal import LinuxSystem
internal import Synchronization
internal import SystemPackage

/// What one thread needs to read a chunk of any image of a chain, and the content of the
/// chunk that it read last.
final class ChunkDecoder {
  let decompressor: ZstdDecompressor
  private let mapping: Mapping
  /// Bytes of the content of the chain's largest chunk. A frame that is longer than its
  /// content is not made, so there is as much room for a frame.
  let room: Int
  /// The number in the chain of the first block in `content`, which is checked; -1 for none.
  var firstBlock = -1
  /// Bytes of it.
  var contentLength = 0

  /// Room for chunks of so many blocks.
  init(blocks: Int) throws(Errno) {
    room = blocks * ImageLimits.blockSize
    mapping = try Mapping(anonymous: 2 * room)
    guard let decompressor = ZstdDecompressor() else { throw .noMemory }
    self.decompressor = decompressor
  }

  /// Room for the content.
  var content: UnsafeMutableRawPointer { unsafe mapping.pointer }
  /// Room for the frame.
  var frame: UnsafeMutableRawPointer { unsafe mapping.pointer + room }
}

/// Decoders of a chain of images that no thread uses now. Taking one and giving it back takes
/// no lock. There are as many as threads have read at once, and two: each has about 200 KiB.
@safe
final class DecoderPool: @unchecked Sendable {
  // SAFETY: the slots are atomics; a decoder is in one slot or with one thread.

  /// More threads than that make decoders of their own, now and then.
  private static let slotCount = 64

  private let blocks: Int
  /// Each the bits of a retained `ChunkDecoder`, or 0.
  private let slots: UnsafeMutablePointer<Atomic<UInt>>

  /// A pool with two decoders, so that the first faults need not make one.
  ///
  /// - Parameter blocks: of the largest compressed chunk; 0 where none are compressed.
  init(blocks: Int) throws(Errno) {
    self.blocks = blocks
    unsafe slots = .allocate(capacity: Self.slotCount)
    for slot in 0..<Self.slotCount { unsafe (slots + slot).initialize(to: Atomic(0)) }
    guard blocks > 0 else { return }
    for _ in 0..<2 { put(try ChunkDecoder(blocks: blocks)) }
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
        decoder = try ChunkDecoder(blocks: blocks)
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
