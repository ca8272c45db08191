// SPDX-License-Identifier: Apache-2.0

internal import CXXHash
internal import Synchronization

/// The blocks that an image has already, by content.
///
/// Content is told apart by a hash of 128 bits whose seed is random for each image: nobody,
/// the guest neither, can prepare two blocks that it takes for one.
final class KnownBlocks: Sendable {
  private struct Key: Hashable {
    let low: UInt64
    let high: UInt64

    /// The key is a hash already.
    func hash(into hasher: inout Hasher) { hasher.combine(low) }
  }

  private final class Shard: Sendable {
    let numbers = Mutex<[Key: UInt32]>([:])
  }

  private let seed = UInt64.random(in: .min ... .max)
  private let shards = (0..<64).map { _ in Shard() }

  /// The number of a stored block with the same content; where there is none, `number` is
  /// entered and returned.
  @unsafe func number(of block: UnsafeRawPointer, orEnter number: UInt32) -> UInt32 {
    // SAFETY: the caller vouches for a block.
    let hash = unsafe XXH_INLINE_XXH3_128bits_withSeed(block, ImageLimits.blockSize, seed)
    let key = Key(low: hash.low64, high: hash.high64)
    return shards[Int(hash.high64 >> 58)].numbers.withLock { numbers in
      if let known = numbers[key] { return known }
      numbers[key] = number
      return number
    }
  }
}
