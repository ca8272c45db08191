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

  /// Whether everything is as it was written.
  public var isIntact: Bool { damagedBlocks == 0 }

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
  /// sense in looking at the memory; and `limitExceeded` when there is no memory for its
  /// buffer of 2 MiB. Bad memory is in the report.
  ///
  /// - Parameter progress: called at least once for each 2 MiB with the blocks done and all
  ///   blocks.
  public func verify(
    progress: (_ done: Int, _ total: Int) -> Void = { _, _ in }
  ) throws(ImageError) -> VerifyReport {
    let current = try ImageCatalog(reading: file, path: path)
    guard current.id == id, current.regions == regions else {
      throw ImageError(.damaged, path, "the file was overwritten while it was open")
    }
    let buffer: Mapping
    do throws(Errno) {
      buffer = try Mapping(anonymous: RegionGeometry.entriesPerPage * ImageLimits.blockSize)
    } catch {
      throw ImageError(.limitExceeded, path, "there is no memory to verify it", errno: error)
    }
    let total = regions.reduce(0) { $0 + $1.blockCount }
    var report = VerifyReport()
    for region in geometries.indices {
      for page in 0..<geometries[region].indexPageCount {
        verify(page: page, ofRegion: region, through: buffer, &report)
        progress(report.zeroBlocks + report.dataBlocks + report.damagedBlocks, total)
      }
    }
    return report
  }

  /// Checks one index page and its blocks.
  ///
  /// - Parameter buffer: room for the page's blocks.
  private func verify(
    page: Int, ofRegion region: Int, through buffer: borrowing Mapping,
    _ report: inout VerifyReport
  ) {
    let geometry = geometries[region]
    let blocks = geometry.blocks(ofIndexPage: page)
    let offset = geometry.offset(ofIndexPage: page)
    var entries = VerifiedIndex.Staging(repeating: 0)
    let outcome = VerifiedIndex.read(
      into: &entries, from: file, offset: offset, seed: geometry.seed(ofIndexPage: page))
    if let cause = outcome.cause(mismatch: .index) {
      report.add(
        VerifyReport.Damage(
          region: region, firstBlock: blocks.lowerBound, blockCount: blocks.count,
          fileOffset: offset, cause: cause))
      return
    }
    var block = blocks.lowerBound
    while block < blocks.upperBound {
      var end = block
      while end < blocks.upperBound, entries[end - blocks.lowerBound] != 0 { end += 1 }
      if end == block {
        report.zeroBlocks += 1
        block += 1
        continue
      }
      var next = block
      // After a bad block small steps, so that a ruined area is not read over and over.
      var step = RegionGeometry.entriesPerPage
      while next < end {
        let last = min(end, next + step)
        // SAFETY: the buffer is this call's own and holds all blocks of an index page.
        let checked = unsafe check(next..<last, of: geometry, into: buffer.pointer) { block in
          entries[block - blocks.lowerBound]
        }
        report.dataBlocks += checked.good
        next += checked.good
        step *= 2
        if let cause = checked.outcome.cause(mismatch: .data) {
          report.add(
            VerifyReport.Damage(
              region: region, firstBlock: next, blockCount: 1,
              fileOffset: geometry.offset(ofBlock: next), cause: cause))
          next += 1
          step = 1
        }
      }
      block = end
    }
  }
}

extension ReadOutcome {
  /// What the report says about it; `nil` if all is well.
  fileprivate func cause(
    mismatch: VerifyReport.Damage.Cause
  ) -> VerifyReport.Damage.Cause? {
    switch self {
    case .ready: nil
    case .damaged, .busy: mismatch
    case .failed(.noData): .truncated
    case .failed(let errno): .inputOutput(errno)
    }
  }
}
