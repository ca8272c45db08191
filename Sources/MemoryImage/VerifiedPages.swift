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
  /// It does not match its checksum.
  case damaged
  /// It cannot be read.
  case failed(Errno)

  /// Whether it was not to wait for storage and would have had to.
  var wouldWait: Bool {
    if case .failed(.wouldBlock) = self { true } else { false }
  }
}

/// A page of an index or of a chunk table whose checksum was right, to look up entries in.
///
/// Another thread may replace the page meanwhile. What is read then is thrown away
/// (`VerifiedPages.read`), so whoever reads must neither keep it nor rely on it before.
@safe
struct VerifiedPage {
  fileprivate let words: UnsafePointer<Atomic<UInt64>>

  /// Eight bytes; the place counts words and is below 511.
  @inline(__always)
  func word(_ place: Int) -> UInt64 {
    // SAFETY: the page has 512 words, and lives as long as whoever handed it out says.
    unsafe words[place].load(ordering: .relaxed)
  }

  /// Four bytes; the place counts halves of words and is below 1022.
  @inline(__always)
  func half(_ place: Int) -> UInt32 {
    UInt32(truncatingIfNeeded: word(place &>> 1) &>> UInt64((place & 1) &* 32))
  }
}

/// A bounded number of pages of indexes and chunk tables, read from the file when they are
/// needed, checked as a whole, and kept until others need their room.
///
/// Any number of threads read at once. They take no lock, wait for nobody and allocate
/// nothing. Each slot has a sequence number, which is odd while the slot is being filled
/// (a seqlock):
///
/// - A reader notes the number, takes what it came for, and looks at the number again. If it
///   is another one, what was taken is thrown away.
/// - A thread that misses a page reads it to its stack, checks it there, and answers from
///   that copy. Then it makes the number of a slot odd, which one thread at a time can, copies
///   the page, and makes it even. If another thread has the slot, the copy is not kept.
///
/// A page of number `n` goes to one of the four slots of set `n mod sets`. So pages whose
/// numbers follow each other never push each other out while there is room.
@safe
final class VerifiedPages: @unchecked Sendable {
  // SAFETY: `Sendable` because all that changes is atomic, in the order of the protocol above.

  /// What is known of a slot. All zero: empty, as no page has number 0 here.
  private struct Slot: ~Copyable {
    /// Odd while the slot is being filled. 64 bits: it never comes round.
    let sequence: Atomic<UInt64>
    /// 1 + the number of the page in it.
    let tag: Atomic<UInt64>
  }

  /// Slots of a set: 64 bytes, a cache line.
  private static let ways = 4
  private static let wordsPerPage = 512
  /// Words of a page before its checksum.
  private static let entryWords = 511

  private let setCount: Int
  private let mapping: Mapping
  private let slots: UnsafeMutablePointer<Slot>
  private let words: UnsafeMutablePointer<Atomic<UInt64>>
  /// Moves on with each page that is pushed out.
  private let hand = Atomic<Int>(0)

  /// Room for at least one page, and for about `capacity`. Memory is used as pages are loaded.
  init(capacity: Int) throws(Errno) {
    let sets = max(1, (capacity + Self.ways - 1) / Self.ways)
    let slotBytes = sets * Self.ways * MemoryLayout<Slot>.stride
    let slotPages = (slotBytes + ImageLimits.blockSize - 1) / ImageLimits.blockSize
    let mapping = try Mapping(
      anonymous: (slotPages + sets * Self.ways) * ImageLimits.blockSize)
    // SAFETY: the mapping is page aligned, zeroed (a valid value of each type), long enough
    // for both, and lives as long as `self`.
    unsafe slots = mapping.pointer.assumingMemoryBound(to: Slot.self)
    unsafe words = (mapping.pointer + slotPages * ImageLimits.blockSize)
      .assumingMemoryBound(to: Atomic<UInt64>.self)
    setCount = sets
    self.mapping = mapping
  }

  /// Pages that there is room for.
  var capacity: Int { setCount * Self.ways }

  /// Looks something up in a page, which is read from the file if it is not here.
  ///
  /// - Parameters:
  ///   - page: its number, the same for the same page of the same file.
  ///   - value: what `body` returned; as it was where the page is not to be had.
  ///   - waits: `false` fails with `wouldBlock` in place of waiting for storage.
  ///   - body: may be called more than once, also with a page whose words are not of one
  ///     time: it must end, must not trap, and has no effect but its value.
  @inline(__always)
  func read<Value>(
    _ page: Int, from file: borrowing OwnedDescriptor, offset: Int, seed: UInt64,
    _ value: inout Value, waits: Bool = true, _ body: (VerifiedPage) -> Value
  ) -> ReadOutcome {
    let tag = UInt64(truncatingIfNeeded: page) &+ 1
    let first = (page % setCount) &* Self.ways
    for way in first..<first &+ Self.ways {
      // SAFETY: the slot is one of the set's.
      let slot = unsafe slots + way
      // Acquires what the thread that filled the slot wrote before.
      let before = unsafe slot.pointee.sequence.load(ordering: .acquiring)
      guard before & 1 == 0, unsafe slot.pointee.tag.load(ordering: .relaxed) == tag
      else { continue }
      let found = body(unsafe VerifiedPage(words: words + way &* Self.wordsPerPage))
      // Pairs with the fence in `keep`: whoever saw a word of another page sees the number
      // that was made odd before that word was written.
      atomicMemoryFence(ordering: .acquiring)
      guard unsafe slot.pointee.sequence.load(ordering: .relaxed) == before else { continue }
      value = found
      return .ready
    }
    return load(page, from: file, offset: offset, seed: seed, &value, waits: waits, body)
  }

  /// Reads a page from the file, checks it, and answers from that copy.
  @inline(never)
  private func load<Value>(
    _ page: Int, from file: borrowing OwnedDescriptor, offset: Int, seed: UInt64,
    _ value: inout Value, waits: Bool, _ body: (VerifiedPage) -> Value
  ) -> ReadOutcome {
    var staging = Staging(repeating: 0)
    let outcome = Self.read(
      into: &staging, from: file, offset: offset, seed: seed, waits: waits)
    guard case .ready = outcome else { return outcome }
    return unsafe withUnsafeBytes(of: &staging) { bytes in
      guard let start = bytes.baseAddress else { return .damaged }
      // SAFETY: the words of the page, which only this thread has.
      let copy = unsafe VerifiedPage(words: start.assumingMemoryBound(to: Atomic<UInt64>.self))
      keep(copy, page)
      value = body(copy)
      return .ready
    }
  }

  /// Puts a page into a slot of its set, unless another thread is filling that one.
  private func keep(_ copy: VerifiedPage, _ page: Int) {
    let tag = UInt64(truncatingIfNeeded: page) &+ 1
    let first = (page % setCount) * Self.ways
    var way = -1
    for candidate in first..<first + Self.ways {
      let found = unsafe slots[candidate].tag.load(ordering: .relaxed)
      // Another thread was faster.
      if found == tag { return }
      if found == 0, way < 0 { way = candidate }
    }
    if way < 0 { way = first + hand.wrappingAdd(1, ordering: .relaxed).oldValue & (Self.ways - 1) }
    // SAFETY: the slot is one of the set's.
    let slot = unsafe slots + way
    let before = unsafe slot.pointee.sequence.load(ordering: .relaxed)
    guard before & 1 == 0,
      unsafe slot.pointee.sequence.compareExchange(
        expected: before, desired: before + 1, ordering: .acquiring
      ).exchanged
    else { return }
    // The odd number is seen before anything that follows.
    atomicMemoryFence(ordering: .releasing)
    unsafe slot.pointee.tag.store(tag, ordering: .relaxed)
    let target = unsafe words + way * Self.wordsPerPage
    for word in 0..<Self.entryWords {
      unsafe target[word].store(copy.word(word), ordering: .relaxed)
    }
    unsafe slot.pointee.sequence.store(before + 2, ordering: .releasing)
  }

  /// A page as in the file, on the stack: loading allocates nothing.
  typealias Staging = InlineArray<512, UInt64>

  /// Reads a page and checks it against its checksum.
  static func read(
    into staging: inout Staging, from file: borrowing OwnedDescriptor, offset: Int, seed: UInt64,
    waits: Bool = true
  ) -> ReadOutcome {
    let failure: Errno? = unsafe withUnsafeMutableBytes(of: &staging) { bytes in
      do throws(Errno) {
        // SAFETY: the bytes are the caller's own, for the time of the closure.
        try unsafe file.readAll(into: bytes, at: offset, waits: waits)
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
}
