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
  /// Blocks of all regions.
  public internal(set) var blockCount = 0
  /// Whether only a sample of the data was read.
  public internal(set) var isSample = false
  /// Blocks of data that are not in the sample. Their entries in index and chunk table are
  /// right.
  public internal(set) var unreadBlocks = 0

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
  /// sense in looking at the memory; and `limitExceeded` when there is no memory. It takes 4 bytes
  /// for each chunk of the chain, and no more than 64 MiB: chunks of an image that has more may be
  /// read more than once. Bad memory is in the report.
  ///
  /// - Parameters:
  ///   - sample: the share of the data to read, 0 to 1: that share of the chunks of each image
  ///     of the chain, and at least one, spread evenly and at random. Header, tables, index,
  ///     the entries of all chunks, device states and working set are always looked at.
  ///   - seed: decides which chunks.
  ///   - progress: called at least once for each 4 MiB with the blocks done and all blocks.
  public func verify(
    sample: Double = 1, seed: UInt64 = 0,
    progress: (_ done: Int, _ total: Int) -> Void = { _, _ in }
  ) throws(ImageError) -> VerifyReport {
    try verify(sample: sample, seed: seed, rememberedChunks: 16 << 20, progress: progress)
  }

  /// The same with room for what is known of so many chunks, for tests.
  package func verify(
    sample: Double = 1, seed: UInt64 = 0, rememberedChunks: Int,
    progress: (_ done: Int, _ total: Int) -> Void = { _, _ in }
  ) throws(ImageError) -> VerifyReport {
    func requireSame() throws(ImageError) {
      let current = try ImageCatalog(reading: own.file, path: path)
      guard current.id == id, current.regions == regions else {
        throw ImageError(.damaged, path, "the file was overwritten while it was open")
      }
    }
    try requireSame()
    var check = try ImageCheck(
      self, ChunkSample(share: sample, seed: seed), rememberedChunks: rememberedChunks)
    let total = regions.reduce(0) { $0 + $1.blockCount }
    for region in geometries.indices {
      for page in 0..<geometries[region].indexPageCount {
        check.run(page: page, ofRegion: region)
        progress(check.report.checkedBlocks + check.report.unreadBlocks, total)
      }
    }
    var report = check.report
    // Or what is listed as damage is something else.
    if report.damagedBlocks > 0, own.change == .overwritten { try requireSame() }
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

/// One pass of `MemoryImage.verify`: trusts nothing that was read before.
private struct ImageCheck {
  private let image: MemoryImage
  /// A pass over the chunks of each image of the chain, `own` first.
  private var chunks: [ChunkCheck] = []
  private(set) var report = VerifyReport()

  /// - Parameter rememberedChunks: of the chain.
  init(
    _ image: MemoryImage, _ sample: ChunkSample, rememberedChunks: Int
  ) throws(ImageError) {
    self.image = image
    let stores = [image.own] + image.others
    for store in stores {
      chunks.append(try ChunkCheck(store, sample, room: rememberedChunks / stores.count))
    }
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
      switch check(number: Int(entry) - 1) {
      case .right: report.dataBlocks += 1
      case .unread: report.unreadBlocks += 1
      case .bad(let problem):
        report.add(
          VerifyReport.Damage(
            region: region, firstBlock: block, blockCount: 1, fileOffset: problem.fileOffset,
            cause: problem.outcome.cause(mismatch: .data) ?? .data))
      }
    }
  }

  private mutating func check(number: Int) -> ChunkCheck.Finding {
    let place = chunks.firstIndex { number >= $0.store.base } ?? 0
    return chunks[place].check(number: number - chunks[place].store.base)
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
