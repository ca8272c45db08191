// SPDX-License-Identifier: Apache-2.0

internal import LinuxSystem
internal import Synchronization
package import SystemPackage

/// A bit for each page that several threads change; nothing is allocated after `init`.
///
/// For trackers and what is built on them in this package.
@safe
package struct AtomicPageSet: ~Copyable, @unchecked Sendable {
  // SAFETY: all access to the words is atomic; the mapping lives as long as the set.
  private let storage: Mapping
  private let words: UnsafeMutablePointer<Atomic<UInt64>>
  package let pageCount: Int

  /// No page is set.
  package init(pageCount: Int) throws(Errno) {
    let storage = try Mapping(anonymous: max(4096, ((pageCount + 63) / 64 * 8 + 4095) & ~4095))
    // SAFETY: Atomic<UInt64> has the size and layout of UInt64, and zero bytes are its
    // value 0; anonymous memory is zero.
    unsafe words = storage.pointer.assumingMemoryBound(to: Atomic<UInt64>.self)
    self.storage = storage
    self.pageCount = pageCount
  }

  package borrowing func contains(_ page: Int) -> Bool {
    precondition(page >= 0 && page < pageCount)
    return unsafe words[page >> 6].load(ordering: .acquiring) & (1 << UInt64(page & 63)) != 0
  }

  /// Sets a page; whether it was not set before.
  package borrowing func insert(_ page: Int) -> Bool {
    precondition(page >= 0 && page < pageCount)
    let bit: UInt64 = 1 << UInt64(page & 63)
    return unsafe words[page >> 6].bitwiseOr(bit, ordering: .sequentiallyConsistent).oldValue & bit
      == 0
  }

  package borrowing func insert(_ pages: Range<Int>) {
    precondition(pages.lowerBound >= 0 && pages.upperBound <= pageCount)
    forEachWordMask(in: pages) { index, mask in
      _ = unsafe words[index].bitwiseOr(mask, ordering: .acquiringAndReleasing)
    }
  }

  borrowing func remove(_ pages: Range<Int>) {
    precondition(pages.lowerBound >= 0 && pages.upperBound <= pageCount)
    forEachWordMask(in: pages) { index, mask in
      _ = unsafe words[index].bitwiseAnd(~mask, ordering: .acquiringAndReleasing)
    }
  }

  /// Clears pages, and sets those of them that were set in `bitmap`; `false` when there
  /// were none.
  borrowing func take(_ pages: Range<Int>, into bitmap: inout DirtyBitmap) -> Bool {
    precondition(pages.lowerBound >= 0 && pages.upperBound <= pageCount)
    var found = false
    forEachWordMask(in: pages) { index, mask in
      // Most words are 0, and a plain load does not fetch the line for writing.
      guard unsafe words[index].load(ordering: .relaxed) & mask != 0 else { return }
      let old = unsafe words[index].bitwiseAnd(~mask, ordering: .acquiringAndReleasing).oldValue
      bitmap.insert(word: old & mask, at: index << 6)
      found = true
    }
    return found
  }

  /// Whether every page is set here or in `bitmap`.
  borrowing func covers(_ pages: Range<Int>, with bitmap: DirtyBitmap) -> Bool {
    var result = true
    forEachWordMask(in: pages) { index, mask in
      let here = unsafe words[index].load(ordering: .relaxed)
      if (here | bitmap.words[index]) & mask != mask { result = false }
    }
    return result
  }
}
