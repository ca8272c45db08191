// SPDX-License-Identifier: Apache-2.0

internal import LinuxSystem
internal import Synchronization
public import SystemPackage

/// What a pager knows of one page.
public enum PageState: UInt8, Sendable, CaseIterable {
  /// Not filled yet: its content is the source's.
  case absent = 0
  /// One thread is fetching the content; it will resolve and wake all waiters.
  case filling = 1
  /// Filled; the guest owns the content from here on.
  case present = 2
  /// The guest gave the page up (madvise): it reads as zero, never as the source's
  /// content again.
  case removed = 3
  /// No right content can be had; touching it is an error that the guest sees.
  case poisoned = 4
  /// The mapping is gone.
  case unmapped = 5
}

/// The single truth about the pages of one region: one atomic byte for each page.
///
/// Nothing is allocated before it is used, so making one costs the same for any
/// size; full use costs 256 KiB for each GiB of 4 KiB pages.
@safe
public struct PageStateTable: ~Copyable, @unchecked Sendable {
  // SAFETY: all access to the bytes is atomic; the mapping lives as long as the table.
  private let storage: Mapping
  private let states: UnsafeMutablePointer<Atomic<UInt8>>

  /// Pages in the region.
  public let pageCount: Int

  /// A table in which every page is absent.
  public init(pageCount: Int) throws(Errno) {
    precondition(pageCount > 0)
    let storage = try Mapping(anonymous: (pageCount + 4095) & ~4095)
    // SAFETY: Atomic<UInt8> has the size and layout of UInt8, and zero bytes are its
    // value 0; anonymous memory is zero.
    unsafe states = storage.pointer.assumingMemoryBound(to: Atomic<UInt8>.self)
    self.storage = storage
    self.pageCount = pageCount
  }

  /// The state of a page; acquires what the thread that set it had written.
  public borrowing func load(_ page: Int) -> PageState {
    precondition(page >= 0 && page < pageCount)
    let raw = unsafe states[page].load(ordering: .acquiring)
    // Only this type stores to the bytes, and only valid states.
    return PageState(rawValue: raw) ?? .poisoned
  }

  /// Sets the state of a page.
  public borrowing func store(_ page: Int, _ state: PageState) {
    precondition(page >= 0 && page < pageCount)
    unsafe states[page].store(state.rawValue, ordering: .releasing)
  }

  /// Changes the state if it is what the caller believes; `true` when it was.
  public borrowing func exchange(_ page: Int, from: PageState, to: PageState) -> Bool {
    precondition(page >= 0 && page < pageCount)
    return unsafe states[page].compareExchange(
      expected: from.rawValue, desired: to.rawValue, ordering: .acquiringAndReleasing
    ).exchanged
  }

  /// Claims absent pages from `first` on, stopping at the first that is not absent or
  /// after `limit`; returns how many are now `filling` for the caller.
  public borrowing func claim(from first: Int, limit: Int) -> Int {
    var count = 0
    while count < limit, first + count < pageCount,
      exchange(first + count, from: .absent, to: .filling)
    {
      count += 1
    }
    return count
  }

  /// Sets the state of a range of pages, clipped to the region.
  public borrowing func fill(_ pages: Range<Int>, with state: PageState) {
    for page in pages.clamped(to: 0..<pageCount) { store(page, state) }
  }

  /// How many of the pages are in a state: exact when nothing changes meanwhile.
  public borrowing func count(of state: PageState) -> Int {
    var count = 0
    for page in 0..<pageCount where load(page) == state { count += 1 }
    return count
  }
}
