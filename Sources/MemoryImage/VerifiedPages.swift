// SPDX-License-Identifier: Apache-2.0

internal import Glibc
internal import LinuxSystem
internal import Synchronization
internal import SystemPackage

#if _endian(big)
  #error("The index is used in memory as it is in the file: little-endian.")
#endif

/// What became of reading something. A value and not an error: the caller knows the names
/// that make an error.
enum ReadOutcome {
  /// It was read and checked.
  case ready
  /// Another thread is loading it.
  case busy
  /// It does not match its checksum.
  case damaged
  /// It cannot be read.
  case failed(Errno)
}

/// Pages of an index or of a chunk table in memory, each filled when it is first needed.
///
/// A page is 4096 bytes as in the file: entries, and at the place of the checksum the
/// page's state. A page in state `ready` never changes again, so its entries are read
/// without synchronisation after one acquire load of the state.
///
///     empty -> loading -> ready
///       ^---------'  the page could not be read or is damaged
@safe
final class VerifiedPages: @unchecked Sendable {
  // SAFETY: `Sendable` because of the protocol above: entries are only written by the one
  // thread that moved the page to `loading`, and only read in state `ready`.

  private static let empty: UInt64 = 0
  private static let loading: UInt64 = 1
  private static let ready: UInt64 = 2
  private static let wordsPerPage = 512
  /// Words of a page before its checksum.
  private static let entryWords = 511

  private let mapping: Mapping
  private let words: UnsafeMutablePointer<UInt64>

  /// Room for so many pages. No memory is used until they are loaded.
  init(pageCount: Int) throws(Errno) {
    let mapping = try Mapping(anonymous: max(1, pageCount) * ImageLimits.blockSize)
    // SAFETY: the mapping is page aligned, zeroed, and lives as long as `self`; it holds
    // nothing but words (`Atomic<UInt64>` has the layout of its value).
    unsafe words = mapping.pointer.assumingMemoryBound(to: UInt64.self)
    self.mapping = mapping
  }

  /// Whether a page's entries can be read. Pairs with the release in `load`.
  @inline(__always)
  func isReady(_ page: Int) -> Bool {
    unsafe state(of: page).pointee.load(ordering: .acquiring) == Self.ready
  }

  /// Loads a page if need be. Waits while another thread is loading it: that takes one read.
  @inline(__always)
  func makeReady(
    _ page: Int, from file: borrowing OwnedDescriptor, offset: Int, seed: UInt64
  ) -> ReadOutcome {
    if isReady(page) { return .ready }
    return loadOrWait(page, from: file, offset: offset, seed: seed)
  }

  @inline(never)
  private func loadOrWait(
    _ page: Int, from file: borrowing OwnedDescriptor, offset: Int, seed: UInt64
  ) -> ReadOutcome {
    while true {
      let outcome = load(page: page, from: file, offset: offset, seed: seed)
      guard case .busy = outcome else { return outcome }
      sched_yield()
    }
  }

  /// Eight bytes of a page for which `isReady` was true.
  @inline(__always)
  func word(_ page: Int, _ slot: Int) -> UInt64 {
    // SAFETY: geometry keeps page and slot inside of the mapping; a ready page does not
    // change.
    unsafe words[page &* Self.wordsPerPage &+ slot]
  }

  /// Four bytes of a page for which `isReady` was true.
  @inline(__always)
  func half(_ page: Int, _ slot: Int) -> UInt32 {
    // SAFETY: as for `word`.
    let start = unsafe UnsafeRawPointer(words + page &* Self.wordsPerPage)
    return unsafe start.load(fromByteOffset: slot &* 4, as: UInt32.self)
  }

  /// Reads a page from the file, checks it, and makes it ready.
  func load(
    page: Int, from file: borrowing OwnedDescriptor, offset: Int, seed: UInt64
  ) -> ReadOutcome {
    let state = unsafe state(of: page)
    let (exchanged, original) = unsafe state.pointee.compareExchange(
      expected: Self.empty, desired: Self.loading, ordering: .acquiring)
    guard exchanged else { return original == Self.ready ? .ready : .busy }
    var staging = Staging(repeating: 0)
    let outcome = Self.read(into: &staging, from: file, offset: offset, seed: seed)
    if case .ready = outcome {
      // SAFETY: this thread owns the entries until it leaves `loading`. They come from a
      // copy that was checked, so nothing unchecked ever lies in the index.
      unsafe withUnsafeBytes(of: &staging) { source in
        let target = unsafe UnsafeMutableRawBufferPointer(
          start: words + page * Self.wordsPerPage, count: Self.entryWords * 8)
        unsafe target.copyMemory(from: UnsafeRawBufferPointer(rebasing: source[..<target.count]))
      }
      unsafe state.pointee.store(Self.ready, ordering: .releasing)
    } else {
      // The next reader tries again: the storage may have recovered.
      unsafe state.pointee.store(Self.empty, ordering: .releasing)
    }
    return outcome
  }

  /// A page as in the file, on the stack: loading allocates nothing.
  typealias Staging = InlineArray<512, UInt64>

  /// Reads a page and checks it against its checksum.
  static func read(
    into staging: inout Staging, from file: borrowing OwnedDescriptor, offset: Int, seed: UInt64
  ) -> ReadOutcome {
    let failure: Errno? = unsafe withUnsafeMutableBytes(of: &staging) { bytes in
      do throws(Errno) {
        // SAFETY: the bytes are the caller's own, for the time of the closure.
        try unsafe file.readAll(into: bytes, at: offset)
        return nil
      } catch {
        return error
      }
    }
    if let failure { return .failed(failure) }
    let checksum = unsafe withUnsafeBytes(of: &staging) { bytes in
      unsafe Checksum.of(
        UnsafeRawBufferPointer(rebasing: bytes[..<(Self.entryWords * 8)]),
        seed: seed)
    }
    return checksum == staging[Self.entryWords] ? .ready : .damaged
  }

  @inline(__always)
  private func state(of page: Int) -> UnsafeMutablePointer<Atomic<UInt64>> {
    // SAFETY: the last word of the page, never accessed in another way; all bits zero is
    // a valid `Atomic<UInt64>`.
    let word = unsafe words + (page &* Self.wordsPerPage &+ Self.entryWords)
    return unsafe UnsafeMutableRawPointer(word).assumingMemoryBound(to: Atomic<UInt64>.self)
  }
}
