// SPDX-License-Identifier: Apache-2.0

internal import CXXHash
internal import LinuxSystem
internal import Synchronization
internal import SystemPackage

/// The blocks that an image has already, by content.
///
/// Content is told apart by 96 bits of a hash whose seed is random for each image: nobody,
/// the guest neither, can prepare two blocks that it takes for one, and by accident that
/// happens to two of 2^32 blocks with a probability of 2^-33.
///
/// The memory is bounded: 32 bytes for each block of the image and of its parent, and 64 MiB at most. Beyond that
/// (8 GiB of different content) older blocks are forgotten, and stored again when they recur.
@safe
final class KnownBlocks: @unchecked Sendable {
  // SAFETY: the entries of a shard are touched under its lock only; the mapping lives as long
  // as `self`.

  /// 16 bytes. A number of 0 is an empty one: it is stored plus 1.
  private struct Entry {
    var low: UInt64
    var high: UInt32
    var number: UInt32
  }

  private final class Lock: Sendable {
    let mutex = Mutex<Void>(())
  }

  /// Entries that are looked at for one block: two cache lines.
  private static let probes = 8
  private static let shardCount = 64
  private static let most = 64 << 20

  private let seed = UInt64.random(in: .min ... .max)
  private let locks = (0..<shardCount).map { _ in Lock() }
  private let storage: Mapping
  private let entries: UnsafeMutablePointer<Entry>
  /// A power of two.
  private let groupsPerShard: Int

  /// Knows nothing yet.
  ///
  /// - Parameter blocks: that the image may have, and its parent where it is searched.
  init(blocks: Int) throws(Errno) {
    let wanted = min(max(blocks * 2, 1), Self.most / MemoryLayout<Entry>.stride)
    var groups = 1
    while groups * Self.shardCount * Self.probes < wanted { groups *= 2 }
    groupsPerShard = groups
    let count = groups * Self.shardCount * Self.probes
    let storage = try Mapping(anonymous: max(4096, count * MemoryLayout<Entry>.stride))
    // SAFETY: anonymous memory is zero, which is an empty entry.
    unsafe entries = storage.pointer.bindMemory(to: Entry.self, capacity: count)
    self.storage = storage
  }

  /// The number of a stored block with the same content; where there is none, `number` is
  /// entered and returned.
  @unsafe func number(of block: UnsafeRawPointer, orEnter number: UInt32) -> UInt32 {
    // SAFETY: the caller vouches for a block.
    let hash = unsafe cxxhash_128(block, ImageLimits.blockSize, seed)
    let shard = Int(hash.high64 >> 58)
    let group = Int(truncatingIfNeeded: hash.high64 >> 32) & (groupsPerShard - 1)
    let high = UInt32(truncatingIfNeeded: hash.high64)
    // SAFETY: shard and group are below their numbers.
    let first = unsafe entries + (shard * groupsPerShard + group) * Self.probes
    return locks[shard].mutex.withLock { _ in
      // Any of a full group gives way.
      var free = Int(truncatingIfNeeded: hash.low64) & (Self.probes - 1)
      for probe in 0..<Self.probes {
        let entry = unsafe first[probe]
        if entry.number == 0 {
          free = probe
          break
        }
        if entry.low == hash.low64, entry.high == high { return entry.number - 1 }
      }
      unsafe first[free] = Entry(low: hash.low64, high: high, number: number + 1)
      return number
    }
  }
}
