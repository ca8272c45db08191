// SPDX-License-Identifier: Apache-2.0

internal import Glibc
internal import LinuxSystem
internal import Synchronization
internal import SystemPackage

/// What one thread needs to read a chunk of any image of a chain, and the contents of the
/// chunks that it read last.
///
/// Blocks that are equal are stored once, so that whoever reads a region upwards looks back into
/// other chunks now and then, and often for the same few blocks: those are kept by themselves.
final class ChunkDecoder {
  /// Contents that are kept.
  private static let ways = 3
  /// Blocks that are kept, each in the one place that its number gives it.
  private static let places = 64

  let decompressor: ZstdDecompressor
  private let mapping: Mapping
  /// Bytes of the content of the chain's largest chunk. A frame that is longer than its
  /// content is not made, so there is as much room for a frame.
  let room: Int
  /// For each content the number in the chain of its first block, which is checked; -1 for none.
  private var firstBlocks = InlineArray<3, Int>(repeating: -1)
  /// Bytes of each.
  private var lengths = InlineArray<3, Int>(repeating: 0)
  private var usedAt = InlineArray<3, UInt64>(repeating: 0)
  private var clock: UInt64 = 0
  private var way = 0
  /// For each place the number in the chain of the block there; -1 for none.
  private var keptBlocks = InlineArray<64, Int>(repeating: -1)

  /// Room for chunks of so many blocks.
  init(blocks: Int) throws(Errno) {
    room = blocks * ImageLimits.blockSize
    mapping = try Mapping(
      anonymous: (Self.ways + 1) * room + Self.places * ImageLimits.blockSize)
    guard let decompressor = ZstdDecompressor() else { throw .noMemory }
    self.decompressor = decompressor
  }

  /// Makes the content of a chunk the one in hand, if it is there.
  func select(firstBlock: Int) -> Bool {
    for candidate in 0..<Self.ways where firstBlocks[candidate] == firstBlock {
      take(candidate)
      return true
    }
    return false
  }

  /// Takes the room of the content that was used longest ago; it holds no chunk from here on.
  func makeRoom() {
    var oldest = 0
    for candidate in 1..<Self.ways where usedAt[candidate] < usedAt[oldest] { oldest = candidate }
    take(oldest)
    firstBlocks[oldest] = -1
  }

  private func take(_ way: Int) {
    clock &+= 1
    usedAt[way] = clock
    self.way = way
  }

  /// Of the content in hand.
  var firstBlock: Int {
    get { firstBlocks[way] }
    set { firstBlocks[way] = newValue }
  }

  /// Bytes of the content in hand.
  var contentLength: Int {
    get { lengths[way] }
    set { lengths[way] = newValue }
  }

  /// Room for the content in hand.
  var content: UnsafeMutableRawPointer { unsafe mapping.pointer + way * room }
  /// Room for the frame.
  var frame: UnsafeMutableRawPointer { unsafe mapping.pointer + Self.ways * room }

  // MARK: - Blocks that come again

  /// Where a block lies that was looked back at before; `nil` when it is not here.
  func kept(_ block: Int) -> UnsafeRawPointer? {
    let place = block % Self.places
    return keptBlocks[place] == block ? unsafe UnsafeRawPointer(room(of: place)) : nil
  }

  /// Keeps a block that was checked.
  ///
  /// SAFETY: the caller vouches for 4096 bytes.
  @unsafe func keep(_ block: Int, _ bytes: UnsafeRawPointer) {
    let place = block % Self.places
    unsafe room(of: place).copyMemory(from: bytes, byteCount: ImageLimits.blockSize)
    keptBlocks[place] = block
  }

  private func room(of place: Int) -> UnsafeMutableRawPointer {
    unsafe mapping.pointer + (Self.ways + 1) * room + place * ImageLimits.blockSize
  }
}

/// Decoders of a chain of images that no thread uses now. Taking one and giving it back takes
/// no lock. There are as many as threads have read at once, and two: each has 250 to 500 KiB.
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
    // Mostly the one that this thread had last, with the chunks that it read last.
    if let free = take(from: home..<home + 1) ?? take(from: 0..<Self.slotCount) {
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

  /// The slot that the calling thread looks into first.
  private var home: Int {
    // Its address, mixed (Knuth's multiplicative hash); the six highest bits.
    Int(((UInt64(pthread_self()) >> 12) &* 0x9E37_79B9_7F4A_7C15) >> 58)
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
    let home = home
    for offset in 0..<Self.slotCount {
      let slot = (home + offset) % Self.slotCount
      let (isStored, _) = unsafe (slots + slot).pointee.compareExchange(
        expected: 0, desired: bits, ordering: .releasing)
      if isStored { return }
    }
    unsafe retained.release()
  }
}
