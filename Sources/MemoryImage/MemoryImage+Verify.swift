// SPDX-License-Identifier: Apache-2.0

internal import LinuxSystem
public import SystemPackage

/// What `verify` found.
public struct VerifyReport: Sendable {
  /// A range of blocks whose content cannot be had.
  public struct Damage: Sendable, Hashable {
    /// What is wrong.
    public enum Cause: Sendable, Hashable {
      /// The page of the index does not match its checksum: all its blocks are lost.
      case index
      /// The block does not match its checksum.
      case data
      /// The file ends before.
      case truncated
      /// The storage refused.
      case inputOutput(Errno)
    }

    /// Number of the region.
    public let region: Int
    /// Number of the first 4 KiB block in the region.
    public let firstBlock: Int
    /// Blocks, at least one.
    public let blockCount: Int
    /// Bytes from the start of the file to the bad index page or block.
    public let fileOffset: Int
    /// What is wrong.
    public let cause: Cause
  }

  /// How many ranges `damages` lists at most.
  public static let damageLimit = 1024

  /// Blocks of zeros.
  public internal(set) var zeroBlocks = 0
  /// Blocks of data that match their checksum.
  public internal(set) var dataBlocks = 0
  /// Blocks whose content cannot be had, whether listed or not.
  public internal(set) var damagedBlocks = 0
  /// Where they are, in order; the first `damageLimit` ranges.
  public internal(set) var damages: [Damage] = []

  /// What is wrong with the working set; `nil` when nothing is, or there is none.
  public internal(set) var workingSetFailure: String?
  /// Blocks of all regions, and whether only a sample of them was looked at.
  public internal(set) var blockCount = 0
  /// Whether only a sample was looked at.
  public internal(set) var isSample = false

  /// Blocks that were looked at.
  public var checkedBlocks: Int { zeroBlocks + dataBlocks + damagedBlocks }

  /// Whether everything is as it was written.
  public var isIntact: Bool { damagedBlocks == 0 && workingSetFailure == nil }

  mutating func add(_ damage: Damage) {
    damagedBlocks += damage.blockCount
    if damages.count < Self.damageLimit { damages.append(damage) }
  }
}

extension MemoryImage {
  /// Reads the whole file again, also what was checked before, and lists what is bad.
  ///
  /// It is bound by the storage; what is in the kernel's page cache is not read from the
  /// storage again. Other threads may read meanwhile.
  ///
  /// Throws `ImageError` when header, tables or device states are bad: then there is no
  /// sense in looking at the memory; and `limitExceeded` when there is no memory for a
  /// byte for each chunk of the chain. Bad memory is in the report.
  ///
  /// - Parameters:
  ///   - sample: the share of memory to look at, 0 to 1, in pieces of 1022 blocks (4 MiB);
  ///     header, tables, device states and working set are always looked at. Less than all
  ///     finds damage with that probability only.
  ///   - seed: decides which pieces.
  ///   - progress: called at least once for each 4 MiB with the blocks done and all blocks.
  public func verify(
    sample: Double = 1, seed: UInt64 = 0,
    progress: (_ done: Int, _ total: Int) -> Void = { _, _ in }
  ) throws(ImageError) -> VerifyReport {
    let current = try ImageCatalog(reading: own.file, path: path)
    guard current.id == id, current.regions == regions else {
      throw ImageError(.damaged, path, "the file was overwritten while it was open")
    }
    var check = try ImageCheck(self)
    let total = regions.reduce(0) { $0 + $1.blockCount }
    var random = SampleGenerator(state: seed)
    for region in geometries.indices {
      for page in 0..<geometries[region].indexPageCount
      where sample >= 1 || random.nextShare() < sample {
        check.run(page: page, ofRegion: region)
        progress(check.report.checkedBlocks, total)
      }
    }
    var report = check.report
    report.blockCount = total
    report.isSample = sample < 1
    do throws(ImageError) {
      _ = try workingSet()
    } catch {
      report.workingSetFailure = error.reason
    }
    return report
  }
}

/// SplitMix64: the same pieces for the same seed.
private struct SampleGenerator {
  var state: UInt64

  /// From 0 up to but not 1.
  mutating func nextShare() -> Double {
    state &+= 0x9E37_79B9_7F4A_7C15
    var value = state
    value = (value ^ value >> 30) &* 0xBF58_476D_1CE4_E5B9
    value = (value ^ value >> 27) &* 0x94D0_49BB_1331_11EB
    return Double((value ^ value >> 31) >> 11) / Double(1 << 53)
  }
}

/// One pass of `MemoryImage.verify`: trusts nothing that was read before.
private struct ImageCheck {
  private let image: MemoryImage
  /// A pass over the chunks of each image of the chain, `own` first.
  private var chunks: [ChunkCheck] = []
  private(set) var report = VerifyReport()

  init(_ image: MemoryImage) throws(ImageError) {
    self.image = image
    for store in [image.own] + image.others { chunks.append(try ChunkCheck(store)) }
  }

  /// Checks one index page and its blocks.
  mutating func run(page: Int, ofRegion region: Int) {
    let geometry = image.geometries[region]
    let blocks = geometry.blocks(ofIndexPage: page)
    let offset = geometry.offset(ofIndexPage: page)
    var words = VerifiedPages.Staging(repeating: 0)
    let outcome = VerifiedPages.read(
      into: &words, from: image.own.file, offset: offset, seed: geometry.seed(ofIndexPage: page))
    if let cause = outcome.cause(mismatch: .index) {
      report.add(
        VerifyReport.Damage(
          region: region, firstBlock: blocks.lowerBound, blockCount: blocks.count,
          fileOffset: offset, cause: cause))
      return
    }
    for block in blocks {
      let slot = block - blocks.lowerBound
      let entry = UInt32(truncatingIfNeeded: words[slot / 2] >> (slot % 2 == 0 ? 0 : 32))
      if entry == 0 {
        report.zeroBlocks += 1
        continue
      }
      guard let problem = check(number: Int(entry) - 1) else {
        report.dataBlocks += 1
        continue
      }
      report.add(
        VerifyReport.Damage(
          region: region, firstBlock: block, blockCount: 1, fileOffset: problem.fileOffset,
          cause: problem.outcome.cause(mismatch: .data) ?? .data))
    }
  }

  private mutating func check(number: Int) -> ChunkOutcome? {
    let place = chunks.firstIndex { number >= $0.store.base } ?? 0
    return chunks[place].check(number: number - chunks[place].store.base)
  }
}

/// Checks the chunks of one image, each once.
private struct ChunkCheck {
  let store: ChunkStore
  private let decoder: ChunkDecoder
  /// Pages of the chunk table, read again.
  private let pages: VerifiedPages
  /// For each chunk: 0 not looked at; 1 to 16 good, so many blocks; 255 bad.
  private var states: [UInt8]
  /// What is wrong with bad chunks; those that find no room here are looked at again.
  private var problems: [Int: ChunkOutcome] = [:]

  private static let problemLimit = 4096
  private static let bad: UInt8 = 255

  init(_ store: ChunkStore) throws(ImageError) {
    self.store = store
    states = Array(repeating: 0, count: store.chunks.chunkCount)
    do throws(Errno) {
      decoder = try ChunkDecoder(blocks: store.chunks.blocksPerChunk)
      pages = try VerifiedPages(capacity: min(64, store.chunks.tablePageCount))
    } catch {
      throw ImageError(.limitExceeded, store.path, "there is no memory to verify it", errno: error)
    }
  }

  /// What is wrong with a block, by its number in this image.
  mutating func check(number: Int) -> ChunkOutcome? {
    let chunks = store.chunks
    let (chunk, slot) = number.quotientAndRemainder(dividingBy: chunks.blocksPerChunk)
    guard chunk < chunks.chunkCount else {
      return ChunkOutcome(outcome: .damaged, fileOffset: chunks.tableOffset)
    }
    if states[chunk] == Self.bad, let problem = problems[chunk] { return problem }
    if states[chunk] == 0 || states[chunk] == Self.bad {
      if let problem = look(at: chunk) {
        states[chunk] = Self.bad
        if problems.count < Self.problemLimit { problems[chunk] = problem }
        return problem
      }
      states[chunk] = UInt8(
        chunks.isStored ? 1 : decoder.contentLength / ImageLimits.blockSize)
    }
    guard slot < Int(states[chunk]) else {
      return ChunkOutcome(
        outcome: .damaged, fileOffset: chunks.offset(ofTablePage: chunks.place(of: chunk).page))
    }
    return nil
  }

  /// Reads a chunk and checks it; `nil` when it is good.
  private func look(at chunk: Int) -> ChunkOutcome? {
    guard store.chunks.isStored else { return store.decode(chunk, with: decoder, pages: pages) }
    // SAFETY: the decoder has room for a block.
    return unsafe store.readStored(chunk, count: 1, into: decoder.content, pages: pages).failure
  }
}

extension ReadOutcome {
  /// What the report says about it; `nil` if all is well.
  fileprivate func cause(
    mismatch: VerifyReport.Damage.Cause
  ) -> VerifyReport.Damage.Cause? {
    switch self {
    case .ready: nil
    case .damaged: mismatch
    case .failed(.noData): .truncated
    case .failed(let errno): .inputOutput(errno)
    }
  }
}
