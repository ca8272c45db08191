// SPDX-License-Identifier: Apache-2.0

internal import GuestMemory
public import LinuxSystem
internal import Synchronization
public import SystemPackage

/// The clean pages of one region of an image, once for all clones of it on this host.
///
/// A memory file (tmpfs or hugetlbfs) is filled page by page, the first time that some clone
/// needs a page. Each clone maps it privately (`makeMapping`, or MAP_PRIVATE of a descriptor from
/// `duplicate`) and is registered MISSING|MINOR: clean pages arrive by UFFDIO_CONTINUE and are
/// the same memory in all clones; what a clone writes is copied by the kernel and its own.
///
/// Nobody but this cache writes to the file. It can neither grow nor shrink (memfd_create(2),
/// F_SEAL_GROW, F_SEAL_SHRINK), and only its owner and who may override permissions can open it
/// anew (mode 0600). Without a budget it cannot be written to through any descriptor or new mapping
/// either (F_SEAL_FUTURE_WRITE). With one pages have to be taken out again, which that seal forbids
/// even to the cache; then give descriptors only to clones of other users.
///
/// The owner keeps it while a clone has pages of it: sessions do that by themselves.
public final class SharedPageCache: Sendable {
  /// Bytes of the region.
  public let length: Int
  /// The unit in which it is filled.
  public let pageSize: PageSize
  /// What it shares a limit with; `nil` for no limit.
  public let budget: CacheBudget?

  private let file: MemoryFile
  private let alias: Mapping
  /// absent, filling, or present in the file.
  private let states: PageStateTable
  /// For each page how many clones have it, or are about to.
  private let holders: HolderCounts
  private let used = Atomic<Int>(0)
  private let evicted = Atomic<Int>(0)
  /// Where the search for a page that nobody has goes on.
  private let hand = Atomic<Int>(0)
  /// Whether a page was given back since a search found none: without it none is looked for.
  private let mayHaveIdle = Atomic<Bool>(false)
  private let isRetired = Atomic<Bool>(false)

  /// An empty cache.
  ///
  /// - Parameters:
  ///   - length: bytes of the region; a multiple of the page size.
  ///   - pageSize: 4 KiB gives tmpfs, 2 MiB hugetlbfs. Without a budget its pages are set aside
  ///     now: `noMemory` when the pool has too few.
  ///   - budget: a limit, also of other caches. What finds no room goes to the one clone that
  ///     asked for it (UFFDIO_COPY).
  public init(
    length: Int, pageSize: PageSize = .size4KiB, budget: CacheBudget? = nil
  ) throws(Errno) {
    file = try MemoryFile(name: "faultline-clean-pages", length: length, pageSize: pageSize)
    alias = try Mapping(
      of: file.descriptor, length: length, sharing: .shared,
      reserved: pageSize != .size4KiB && budget?.evicts != true)
    states = try PageStateTable(pageCount: length / pageSize.bytes)
    holders = try HolderCounts(pages: length / pageSize.bytes)
    self.length = length
    self.pageSize = pageSize
    self.budget = budget
    try file.restrictToOwner()
    try file.seal(futureWrites: budget?.evicts != true)
    if budget?.evicts == true { budget?.add(self) }
  }

  deinit { budget?.giveBack(usedBytes) }

  /// Bytes that are in the file.
  public var usedBytes: Int { used.load(ordering: .relaxed) }
  /// Pages that were taken out to make room.
  public var evictedPages: Int { evicted.load(ordering: .relaxed) }

  /// A private mapping of the whole region, in this process, for one clone.
  ///
  /// - Parameter reserved: huge pages are set aside for all that the clone may write, and
  ///   `noMemory` is thrown where the pool has too few. Without that a write is SIGBUS when the
  ///   pool is empty. For pages of 4 KiB it means nothing.
  public func makeMapping(reserved: Bool = true) throws(Errno) -> Mapping {
    try Mapping(
      of: file.descriptor, length: length, sharing: .private,
      reserved: reserved && pageSize != .size4KiB)
  }

  /// A descriptor that can only be read, for a clone in another process.
  public func duplicateForReading() throws(Errno) -> OwnedDescriptor {
    try OwnedDescriptor(
      openingForReading: FilePath("/proc/self/fd/\(file.descriptor.rawValue)"))
  }

  /// Has it give up no page any more: a clone goes on with its memory and without a session, so
  /// nobody knows what it has. `PagerSession.detachClones` does this.
  func retire() {
    isRetired.store(true, ordering: .releasing)
    budget?.remove(self)
  }

  // MARK: - For sessions

  var pageCount: Int { states.pageCount }

  /// Takes a share in the pages from one on that are there; how many.
  ///
  /// They stay until `release`, so that a clone may map them meanwhile.
  func hold(from first: Int, limit: Int) -> Int {
    var count = 0
    // A page that is not there is not to be counted.
    while count < limit, first + count < pageCount, states.load(first + count) == .present {
      holders.add(first + count)
      count += 1
    }
    // Pairs with the fence in `evict`: one of the two sees the other.
    atomicMemoryFence(ordering: .sequentiallyConsistent)
    var there = 0
    while there < count, states.load(first + there) == .present { there += 1 }
    release(first + there..<first + count)
    return there
  }

  /// Gives a share back.
  func release(_ pages: Range<Int>) {
    var isIdle = false
    for page in pages where holders.subtract(page) == 0 { isIdle = true }
    if isIdle { mayHaveIdle.store(true, ordering: .releasing) }
  }

  /// Takes pages from one on that are not there, to fill them; how many.
  func claim(from first: Int, limit: Int) -> Int { states.claim(from: first, limit: limit) }

  /// Gives claimed pages back unfilled.
  func giveBack(_ pages: Range<Int>) { states.take(.giveBack, pages) }

  /// Whether some other thread fills a page.
  func isBeingFilled(_ page: Int) -> Bool { states.load(page) == .filling }

  /// Fills claimed pages; they are there afterwards.
  ///
  /// - Returns: `false` when there is no room; then they are not claimed any more.
  @unsafe
  func fill(_ pages: Range<Int>, from bytes: UnsafeRawPointer) -> Bool {
    let size = pages.count * pageSize.bytes
    guard budget?.take(size, for: self) ?? true else {
      giveBack(pages)
      return false
    }
    let offset = pages.lowerBound * pageSize.bytes
    if pageSize != .size4KiB {
      do throws(Errno) {
        // So that the copy cannot raise SIGBUS where the pool is empty.
        try alias.advise(.populateWrite, offset: offset, length: size)
      } catch {
        budget?.giveBack(size)
        giveBack(pages)
        return false
      }
    }
    // SAFETY: the caller vouches for the bytes; the alias maps the whole file, and claimed pages
    // are this thread's.
    unsafe (alias.pointer + offset).copyMemory(from: bytes, byteCount: size)
    used.wrappingAdd(size, ordering: .relaxed)
    states.take(.fill, pages)
    return true
  }

  // MARK: - Room

  /// Takes pages out that no clone has, in turns over all pages; how many bytes. One thread at a
  /// time: the budget's.
  func evict(bytes: Int) -> Int {
    // On hugetlbfs a hole takes away what clones have of their own at that place, too (fs/hugetlbfs/
    // inode.c, hugetlb_vmdelete_list unmaps private pages as well).
    guard pageSize == .size4KiB, !isRetired.load(ordering: .acquiring) else { return 0 }
    // A page that is given back from here on is for the next search.
    guard mayHaveIdle.exchange(false, ordering: .acquiringAndReleasing) else { return 0 }
    var freed = 0
    // A fault thread looks, and others wait for it meanwhile: where nothing is found soon, the page
    // goes to the one clone.
    var looked = 0
    for _ in 0..<pageCount {
      looked += 1
      guard freed < bytes, looked <= Self.searchLimit else {
        mayHaveIdle.store(true, ordering: .releasing)
        break
      }
      let page = hand.wrappingAdd(1, ordering: .relaxed).oldValue % pageCount
      if evict(page) { freed += pageSize.bytes }
    }
    return freed
  }

  private static var searchLimit: Int { 32_768 }

  /// Takes a page out that no clone has.
  private func evict(_ page: Int) -> Bool {
    guard holders.load(page) == 0, states.take(.reclaim, page) else {
      return false
    }
    atomicMemoryFence(ordering: .sequentiallyConsistent)
    guard holders.load(page) == 0 else {
      states.take(.fill, page)
      return false
    }
    do throws(Errno) {
      try file.punchHole(offset: page * pageSize.bytes, length: pageSize.bytes)
    } catch {
      states.take(.fill, page)
      return false
    }
    used.wrappingSubtract(pageSize.bytes, ordering: .relaxed)
    evicted.wrappingAdd(1, ordering: .relaxed)
    budget?.noteEviction(pageSize.bytes)
    states.take(.giveBack, page)
    return true
  }
}

/// How many clones have each page: two bytes a page.
@safe
struct HolderCounts: ~Copyable, @unchecked Sendable {
  // SAFETY: all access is atomic; the mapping lives as long as the counts.
  private let storage: Mapping
  private let counts: UnsafeMutablePointer<Atomic<UInt16>>

  init(pages: Int) throws(Errno) {
    let storage = try Mapping(anonymous: (pages * 2 + 4095) & ~4095)
    // SAFETY: Atomic<UInt16> has the layout of UInt16; anonymous memory is zero.
    unsafe counts = storage.pointer.assumingMemoryBound(to: Atomic<UInt16>.self)
    self.storage = storage
  }

  func load(_ page: Int) -> UInt16 { unsafe counts[page].load(ordering: .acquiring) }

  /// Stays at its maximum once it is there: that page is never taken out.
  func add(_ page: Int) {
    var found = unsafe counts[page].load(ordering: .relaxed)
    while found < .max {
      let (done, original) = unsafe counts[page].compareExchange(
        expected: found, desired: found + 1, ordering: .acquiringAndReleasing)
      if done { return }
      found = original
    }
  }

  /// How many are left.
  @discardableResult
  func subtract(_ page: Int) -> UInt16 {
    var found = unsafe counts[page].load(ordering: .relaxed)
    while found > 0, found < .max {
      let (done, original) = unsafe counts[page].compareExchange(
        expected: found, desired: found - 1, ordering: .acquiringAndReleasing)
      if done { return found - 1 }
      found = original
    }
    return found
  }
}
