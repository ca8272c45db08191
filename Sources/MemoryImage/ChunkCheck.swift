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
  /// For each chunk: 0 not looked at; 1 to 16 good, so many blocks; `unread`; `bad`.
  private var states: [UInt8]
  /// What is wrong with bad chunks; those that find no room here are looked at again.
  private var problems: [Int: ChunkOutcome] = [:]

  private static let problemLimit = 4096
  private static let unread: UInt8 = 254
  private static let bad: UInt8 = 255

  init(_ store: ChunkStore, _ sample: ChunkSample) throws(ImageError) {
    self.store = store
    self.sample = sample
    states = Array(repeating: 0, count: store.chunks.chunkCount)
    do throws(Errno) {
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
    if states[chunk] == Self.bad, let problem = problems[chunk] { return .bad(problem) }
    if states[chunk] == 0 || states[chunk] == Self.bad {
      if let problem = look(at: chunk) {
        states[chunk] = Self.bad
        if problems.count < Self.problemLimit { problems[chunk] = problem }
        return .bad(problem)
      }
    }
    if states[chunk] == Self.unread { return .unread }
    guard slot < Int(states[chunk]) else {
      return .bad(ChunkOutcome(outcome: .damaged, fileOffset: store.tableOffset(of: chunk)))
    }
    return .right
  }

  /// Reads a chunk, or its entry where it is not in the sample, and checks it; `nil`, and its
  /// state, when it is good.
  private mutating func look(at chunk: Int) -> ChunkOutcome? {
    guard sample.contains(chunk, of: store.chunks.chunkCount) else {
      states[chunk] = Self.unread
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
