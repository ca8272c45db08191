// SPDX-License-Identifier: Apache-2.0

internal import LinuxSystem
internal import SystemPackage

/// Which chunks of an image a verification reads.
struct ChunkSample {
  private static let whole = 1_000_000

  /// Of a million chunks.
  private let share: Int
  private let seed: UInt64

  /// A share of 0 to 1.
  init(share: Double, seed: UInt64) {
    self.share = Int(min(max(share * Double(Self.whole), 1), Double(Self.whole)))
    self.seed = seed
  }

  /// Whether a chunk of `count` is in the sample. The chunks are cut into pieces of which each
  /// has one in the sample, at a random place: so the sample is spread, and never empty.
  func contains(_ chunk: Int, of count: Int) -> Bool {
    let piece = chunk * share / Self.whole
    let first = (piece * Self.whole + share - 1) / share
    let next = min(((piece + 1) * Self.whole + share - 1) / share, count)
    return chunk == first + Int(random(UInt64(piece)) % UInt64(next - first))
  }

  /// SplitMix64.
  private func random(_ number: UInt64) -> UInt64 {
    var value = seed &+ (number &+ 1) &* 0x9E37_79B9_7F4A_7C15
    value = (value ^ value >> 30) &* 0xBF58_476D_1CE4_E5B9
    value = (value ^ value >> 27) &* 0x94D0_49BB_1331_11EB
    return value ^ value >> 31
  }
}

/// Checks the chunks of one image, each once.
struct ChunkCheck {
  /// What there is to say about a block.
  enum Finding {
    /// It matches its checksum.
    case right
    /// It is not in the sample; its chunk's entry in the table is right.
    case unread
    /// It cannot be had.
    case bad(ChunkOutcome)
  }

  let store: ChunkStore
  private let sample: ChunkSample
  private let decoder: ChunkDecoder
  /// Pages of the chunk table, read again.
  private let pages: VerifiedPages
  private let states: ChunkStates
  /// What is wrong with bad chunks; those that find no room here are looked at again.
  private var problems: [Int: ChunkOutcome] = [:]

  private static let problemLimit = 4096

  /// - Parameter room: chunks whose state is kept at most.
  init(_ store: ChunkStore, _ sample: ChunkSample, room: Int) throws(ImageError) {
    self.store = store
    self.sample = sample
    do throws(Errno) {
      states = try ChunkStates(chunks: store.chunks.chunkCount, room: room)
      decoder = try ChunkDecoder(blocks: store.chunks.blocksPerChunk)
      pages = try VerifiedPages(capacity: min(64, store.chunks.tablePageCount))
    } catch {
      throw ImageError(.limitExceeded, store.path, "there is no memory to verify it", errno: error)
    }
  }

  /// What there is to say about a block, by its number in this image.
  mutating func check(number: Int) -> Finding {
    let chunks = store.chunks
    let (chunk, slot) = number.quotientAndRemainder(dividingBy: chunks.blocksPerChunk)
    guard chunk < chunks.chunkCount else {
      return .bad(ChunkOutcome(outcome: .damaged, fileOffset: chunks.tableOffset))
    }
    if states[chunk] == ChunkStates.bad, let problem = problems[chunk] { return .bad(problem) }
    if states[chunk] == 0 || states[chunk] == ChunkStates.bad {
      if let problem = look(at: chunk) {
        states[chunk] = ChunkStates.bad
        if problems.count < Self.problemLimit { problems[chunk] = problem }
        return .bad(problem)
      }
    }
    if states[chunk] == ChunkStates.unread { return .unread }
    guard slot < Int(states[chunk]) else {
      return .bad(ChunkOutcome(outcome: .damaged, fileOffset: store.tableOffset(of: chunk)))
    }
    return .right
  }

  /// Reads a chunk, or its entry where it is not in the sample, and checks it; `nil`, and its
  /// state, when it is good.
  private mutating func look(at chunk: Int) -> ChunkOutcome? {
    guard sample.contains(chunk, of: store.chunks.chunkCount) else {
      states[chunk] = ChunkStates.unread
      return store.checkEntry(of: chunk, pages)
    }
    if store.chunks.isStored {
      states[chunk] = 1
      // SAFETY: the decoder has room for a block.
      return unsafe store.readStored(chunk, count: 1, into: decoder.content, pages: pages).failure
    }
    let problem = store.decode(chunk, with: decoder, pages: pages)
    if problem == nil { states[chunk] = UInt8(decoder.contentLength / ImageLimits.blockSize) }
    return problem
  }
}

/// What is known of chunks: 0 not looked at; 1 to 16 good, so many blocks; `unread`; `bad`.
///
/// An image may claim 2^32 chunks in a file of holes, so there is room for some only, and what is
/// known of one may be forgotten for another: it is looked at again then. Memory is used as chunks
/// are looked at.
@safe
private final class ChunkStates {
  static let unread: UInt8 = 254
  static let bad: UInt8 = 255

  private let mapping: Mapping
  private let count: Int

  init(chunks: Int, room: Int) throws(Errno) {
    count = max(1 << 8, min(chunks, room))
    mapping = try Mapping(anonymous: (count * 4 + 4095) & ~4095)
  }

  /// Each has the state, and above it which chunk of those that share the place it is of.
  private func place(of chunk: Int) -> UnsafeMutablePointer<UInt32> {
    // SAFETY: the mapping has so many words, zeroed, and lives as long as this.
    unsafe mapping.pointer.assumingMemoryBound(to: UInt32.self) + chunk % count
  }

  subscript(chunk: Int) -> UInt8 {
    get {
      let word = unsafe place(of: chunk).pointee
      return Int(word >> 8) == chunk / count ? UInt8(truncatingIfNeeded: word) : 0
    }
    set {
      // Fits: there are 2^32 chunks at most, and at least 2^8 places.
      unsafe place(of: chunk).pointee =
        UInt32(truncatingIfNeeded: chunk / count) << 8 | UInt32(newValue)
    }
  }
}
