// SPDX-License-Identifier: Apache-2.0

internal import LinuxSystem
internal import MemoryImage
internal import Pager
internal import Synchronization
internal import SystemPackage
internal import VMMAdapters

/// The clean pages of one image in one page size, for all clones of it: a cache for each region.
final class ImageCache: Sendable {
  let regions: [SharedPageCache]
  private let owner: ImageCaches

  init(
    _ image: MemoryImage, pageSize: PageSize, owner: ImageCaches
  ) throws(Errno) {
    let budget = owner.budget
    regions = try image.regions.map { (region) throws(Errno) in
      try SharedPageCache(length: region.length, pageSize: pageSize, budget: budget)
    }
    self.owner = owner
  }

  var usedBytes: Int { regions.reduce(0) { $0 + $1.usedBytes } }

  /// Lets no new clone have it: one goes on without its session, so no page is taken out any
  /// more, and the memory comes back only when the last clone lets go.
  func retire() { owner.retire(self) }
}

/// The caches that there are. Without a limit one lives as long as its clones; with one it is
/// kept for later clones, and gives up its pages when others need the room.
final class ImageCaches: Sendable {
  /// The file, and the image in it: a file may be overwritten, and its number used again.
  private struct Key: Hashable {
    let identity: FileIdentity
    let image: ImageID
    let pageSize: PageSize
  }

  private struct Entry {
    let key: Key
    weak var cache: ImageCache?
    /// With a limit, until it is empty.
    var kept: ImageCache?
    var isRetired = false
  }

  let budget: CacheBudget
  private let entries = Mutex<[Entry]>([])

  /// - Parameter limit: bytes of all caches, which are kept for later clones within that; `nil`: half of
  ///   the memory that there is, and no cache is kept longer than its clones.
  init(limit: Int?) {
    budget = CacheBudget(limit: limit ?? MemoryLimit.bytes / 2, evicts: limit != nil)
  }

  /// The cache of an image; it lives as long as somebody has it, or longer with a limit.
  func cache(
    of image: MemoryImage, identity: FileIdentity, pageSize: PageSize
  ) throws(Errno) -> ImageCache {
    let key = Key(identity: identity, image: image.id, pageSize: pageSize)
    // Made under the lock: two of them at a time would need twice the huge pages.
    return try entries.withLock { (entries) throws(Errno) in
      let found = entries.first { $0.key == key && !$0.isRetired }
      if let cache = found?.cache { return cache }
      Self.prune(&entries)
      let cache = try ImageCache(image, pageSize: pageSize, owner: self)
      entries.append(Entry(key: key, cache: cache, kept: budget.evicts ? cache : nil))
      return cache
    }
  }

  func retire(_ cache: ImageCache) {
    entries.withLock { entries in
      guard let index = entries.firstIndex(where: { $0.cache === cache }) else { return }
      entries[index].isRetired = true
      entries[index].kept = nil
    }
  }

  /// Forgets those that are gone, and those that are kept empty and that no clone has.
  private static func prune(_ entries: inout [Entry]) {
    for index in entries.indices where entries[index].kept?.usedBytes == 0 {
      entries[index].kept = nil
      // It is there still if a clone has it.
      entries[index].kept = entries[index].cache
    }
    entries.removeAll { $0.cache == nil }
  }

  /// How many there are, and their bytes.
  var usage: (count: Int, bytes: Int) {
    let caches = entries.withLock { $0.compactMap(\.cache) }
    return (caches.count, caches.reduce(0) { $0 + $1.usedBytes })
  }
}
