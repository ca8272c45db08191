// SPDX-License-Identifier: Apache-2.0

internal import Synchronization

/// A limit for the memory of several caches of clean pages together (`SharedPageCache`).
///
/// What finds no room goes to the one clone that asked for it. Pages that no clone has make room, where
/// they are to (`evicts`): first those of the cache that needs it, then those of the others.
public final class CacheBudget: Sendable {
  /// Bytes that all caches may take; at least 1 MiB.
  public let limit: Int
  /// Whether pages are taken out to make room. Caches whose pages stay are sealed against all writes.
  public let evicts: Bool
  private let used = Atomic<Int>(0)
  private let evicted = Atomic<Int>(0)
  /// Taken only when room has to be made: two threads would take out more than they need.
  private let caches = Mutex<[Entry]>([])

  private struct Entry {
    weak var cache: SharedPageCache?
  }

  /// A limit in bytes, at least 1 MiB.
  ///
  /// - Parameter evicts: `false`: a page that is in a cache stays as long as the cache.
  public init(limit: Int, evicts: Bool = true) {
    self.limit = max(limit, 1 << 20)
    self.evicts = evicts
  }

  /// Bytes that the caches take.
  public var usedBytes: Int { used.load(ordering: .relaxed) }
  /// Pages that were taken out to make room, also of caches that are gone.
  public var evictedPages: Int { evicted.load(ordering: .relaxed) }

  /// Has a cache give up pages for others from here on.
  func add(_ cache: SharedPageCache) {
    caches.withLock { entries in
      entries.removeAll { $0.cache == nil }
      entries.append(Entry(cache: cache))
    }
  }

  /// Takes no pages from a cache any more, and returns when nobody is about to.
  func remove(_ cache: SharedPageCache) {
    caches.withLock { entries in
      entries.removeAll { $0.cache == nil || $0.cache === cache }
    }
  }

  /// Takes room for a cache; `false` where there is none, and none can be made.
  func take(_ bytes: Int, for cache: SharedPageCache) -> Bool {
    if takeFree(bytes) { return true }
    guard evicts, bytes <= limit else { return false }
    return caches.withLock { entries in
      while !takeFree(bytes) {
        let missing = max(1, usedBytes + bytes - limit)
        var freed = cache.evict(bytes: missing)
        // By index: an iterator would allocate.
        for index in entries.indices where freed < missing {
          guard let other = entries[index].cache, other !== cache else { continue }
          freed += other.evict(bytes: missing - freed)
        }
        guard freed > 0 else { return false }
      }
      return true
    }
  }

  /// Gives room back.
  func giveBack(_ bytes: Int) { used.wrappingSubtract(bytes, ordering: .relaxed) }

  /// Notes that a page was taken out, and gives its room back.
  func noteEviction(_ bytes: Int) {
    giveBack(bytes)
    evicted.wrappingAdd(1, ordering: .relaxed)
  }

  private func takeFree(_ bytes: Int) -> Bool {
    var found = used.load(ordering: .relaxed)
    while found + bytes <= limit {
      let (done, original) = used.compareExchange(
        expected: found, desired: found + bytes, ordering: .relaxed)
      if done { return true }
      found = original
    }
    return false
  }
}
