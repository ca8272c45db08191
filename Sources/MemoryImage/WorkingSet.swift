// SPDX-License-Identifier: Apache-2.0

/// Blocks that a guest touched one after the other.
public struct WorkingSetRun: Hashable, Sendable {
  /// Number of the region.
  public var region: Int
  /// Number of the first 4 KiB block in the region.
  public var firstBlock: Int
  /// Blocks, at least one.
  public var blockCount: Int

  /// A run of blocks.
  public init(region: Int, firstBlock: Int, blockCount: Int) {
    self.region = region
    self.firstBlock = firstBlock
    self.blockCount = blockCount
  }
}

/// The pages that a guest needs first, in the order in which it touched them; no block twice.
public struct WorkingSet: Hashable, Sendable {
  /// The runs, in the order of the touches.
  public private(set) var runs: [WorkingSetRun]

  /// Blocks of all runs.
  public var blockCount: Int { runs.reduce(0) { $0 + $1.blockCount } }

  /// A working set of some runs; runs that continue each other become one.
  ///
  /// - Returns: `nil` where a run has blocks that the regions have not, or none, where a block
  ///   occurs twice, or for more than 2^28 blocks.
  public init?(_ runs: [WorkingSetRun], of regions: [ImageRegion]) {
    var check = WorkingSetCheck(regions)
    self.init()
    for run in runs {
      guard check.accepts(run) else { return nil }
      append(run)
    }
  }

  init() { runs = [] }

  mutating func append(_ run: WorkingSetRun) {
    if let last = runs.last, last.region == run.region,
      last.firstBlock + last.blockCount == run.firstBlock
    {
      runs[runs.count - 1].blockCount += run.blockCount
    } else {
      runs.append(run)
    }
  }
}

/// Finds runs that no working set has. A bit for each block of those that it has seen.
struct WorkingSetCheck {
  /// More blocks are not taken: 1 TiB of memory.
  private var left = 1 << 28
  private let blockCounts: [Int]
  private var seen: [BlockSet]

  init(_ regions: [ImageRegion]) {
    blockCounts = regions.map(\.blockCount)
    seen = regions.map { _ in BlockSet() }
  }

  /// Whether the regions have the run's blocks, and none came before.
  mutating func accepts(_ run: WorkingSetRun) -> Bool {
    guard blockCounts.indices.contains(run.region), run.firstBlock >= 0, run.blockCount > 0,
      run.firstBlock <= blockCounts[run.region],
      run.blockCount <= blockCounts[run.region] - run.firstBlock, run.blockCount <= left
    else { return false }
    left -= run.blockCount
    let blocks = run.firstBlock..<run.firstBlock + run.blockCount
    guard seen[run.region].count(in: blocks) == 0 else { return false }
    for block in blocks { seen[run.region].insert(block) }
    return true
  }
}

/// The section of the file (docs/image-format.md, "Working set").
enum WorkingSetSection {
  static let magic: [UInt8] = Array("FLWORKS\n".utf8)
  static let headerLength = 32
  static let entryLength = 16
  /// Bytes of entries that are in memory at a time.
  static let pieceLength = 64 << 10
  /// 256 MiB of runs.
  static let mostRuns = 1 << 24

  /// The whole section.
  static func encode(_ set: WorkingSet, id: ImageID) -> [UInt8] {
    let seed = Checksum.key(id, .workingSet)
    var entries: [UInt8] = []
    entries.reserveCapacity(set.runs.count * entryLength)
    for run in set.runs {
      entries.append(integer: UInt32(run.region))
      entries.append(integer: UInt32(run.blockCount))
      entries.append(integer: UInt64(run.firstBlock))
    }
    var bytes = magic
    bytes.append(integer: UInt64(set.runs.count))
    bytes.append(integer: Checksum.of(entries, seed: seed))
    bytes.append(integer: Checksum.of(bytes, seed: seed))
    return bytes + entries
  }

  /// The number of runs and their checksum; `nil` for what is no header of this image.
  static func decodeHeader(_ bytes: [UInt8], id: ImageID) -> (runs: Int, checksum: UInt64)? {
    guard bytes.count == headerLength else { return nil }
    var reader = ByteReader(bytes)
    guard reader.next(count: 8).elementsEqual(magic) else { return nil }
    let count: UInt64 = reader.next()
    let checksum: UInt64 = reader.next()
    let own: UInt64 = reader.next()
    guard own == Checksum.of(Array(bytes.prefix(24)), seed: Checksum.key(id, .workingSet)),
      count > 0, count <= UInt64(mostRuns)
    else { return nil }
    return (Int(count), checksum)
  }

  /// The runs of some entries, until the body wants no more; `false` then.
  static func decode(_ bytes: [UInt8], _ body: (WorkingSetRun) -> Bool) -> Bool {
    var reader = ByteReader(bytes)
    while reader.remaining >= entryLength {
      let region: UInt32 = reader.next()
      let count: UInt32 = reader.next()
      let first: UInt64 = reader.next()
      let run = WorkingSetRun(
        region: Int(region), firstBlock: Int(truncatingIfNeeded: first), blockCount: Int(count))
      guard body(run) else { return false }
    }
    return true
  }
}
