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
  /// No right content can be had; touching it is an error that the guest sees: the kernel knows.
  case poisoned = 4
  /// The mapping is gone.
  case unmapped = 5
  /// Its content is zero, and nothing is in its place: it is zero by itself, also when nobody
  /// serves it any more.
  case zero = 6
  /// No right content can be had, and the kernel was not told: who touches it waits.
  case withheld = 7
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

  /// Takes a step with a page; `false`, and nothing happens, where its state does not allow it.
  @discardableResult
  public borrowing func take(_ step: PageStep, _ page: Int) -> Bool {
    while true {
      let from = load(page)
      guard let to = from.after(step) else { return false }
      if exchange(page, from: from, to: to) { return true }
    }
  }

  /// Takes a step with each page of a range that allows it, clipped to the region.
  public borrowing func take(_ step: PageStep, _ pages: Range<Int>) {
    let pages = pages.clamped(to: 0..<pageCount)
    var page = pages.lowerBound
    while page < pages.upperBound {
      // Eight at a time where all are the same: a guest may give up all that it has, again and again.
      if page & 7 == 0, page + 8 <= pages.upperBound, let from = uniformState(ofEightFrom: page) {
        guard let to = from.after(step), to != from else {
          page += 8
          continue
        }
        if exchangeEight(from: page, from, to) {
          page += 8
          continue
        }
      }
      take(step, page)
      page += 1
    }
  }

  private borrowing func exchange(_ page: Int, from: PageState, to: PageState) -> Bool {
    precondition(page >= 0 && page < pageCount)
    return unsafe states[page].compareExchange(
      expected: from.rawValue, desired: to.rawValue, ordering: .acquiringAndReleasing
    ).exchanged
  }

  // MARK: - Eight at a time

  /// The eight states from one on, a multiple of 8, as one number.
  private borrowing func word(_ page: Int) -> UnsafeMutablePointer<Atomic<UInt64>> {
    // SAFETY: the mapping is a multiple of eight bytes long and aligned; Atomic<UInt64> has the
    // layout of UInt64. That a byte and its word are both changed atomically is what the
    // processors that this runs on (x86-64, arm64) do.
    unsafe UnsafeMutableRawPointer(states + page).assumingMemoryBound(to: Atomic<UInt64>.self)
  }

  private static func uniform(_ state: PageState) -> UInt64 {
    UInt64(state.rawValue) &* 0x0101_0101_0101_0101
  }

  private borrowing func uniformState(ofEightFrom page: Int) -> PageState? {
    let found = unsafe word(page).pointee.load(ordering: .acquiring)
    guard let state = PageState(rawValue: UInt8(truncatingIfNeeded: found)),
      found == Self.uniform(state)
    else { return nil }
    return state
  }

  private borrowing func exchangeEight(
    from page: Int, _ from: PageState, _ to: PageState
  ) -> Bool {
    unsafe word(page).pointee.compareExchange(
      expected: Self.uniform(from), desired: Self.uniform(to), ordering: .acquiringAndReleasing
    ).exchanged
  }

  /// The first page in a range that is in a state.
  public borrowing func first(_ state: PageState, in pages: Range<Int>) -> Int? {
    let pages = pages.clamped(to: 0..<pageCount)
    var page = pages.lowerBound
    while page < pages.upperBound {
      if page & 7 == 0, page + 8 <= pages.upperBound {
        // Bytes that are equal are zero in the difference; this finds whether one is.
        let difference =
          unsafe word(page).pointee.load(ordering: .acquiring) ^ Self.uniform(state)
        let zeros =
          (difference &- 0x0101_0101_0101_0101) & ~difference & 0x8080_8080_8080_8080
        if zeros == 0 {
          page += 8
          continue
        }
      }
      if load(page) == state { return page }
      page += 1
    }
    return nil
  }

  /// Claims absent pages from `first` on, stopping at the first that is not absent or
  /// after `limit`; returns how many are now `filling` for the caller.
  public borrowing func claim(from first: Int, limit: Int) -> Int {
    var count = 0
    while count < limit, first + count < pageCount, load(first + count) == .absent,
      exchange(first + count, from: .absent, to: .filling)
    {
      count += 1
    }
    return count
  }

  /// How many of the pages are in a state: exact when nothing changes meanwhile.
  public borrowing func count(of state: PageState) -> Int {
    var count = 0
    for page in 0..<pageCount where load(page) == state { count += 1 }
    return count
  }
}
