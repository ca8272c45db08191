// SPDX-License-Identifier: Apache-2.0

/// Regions cut into pieces of at most `PieceWork.pieceLength`, to work on by number. Its size
/// does not depend on the memory's.
public struct RegionPieces: Sendable {
  /// A part of a region.
  public struct Piece: Sendable, Hashable {
    /// The region's number.
    public let region: Int
    /// 4 KiB blocks of the region.
    public let blocks: Range<Int>

    /// The same in bytes from the start of the region.
    public var bytes: Range<Int> {
      blocks.lowerBound * ImageLimits.blockSize..<blocks.upperBound * ImageLimits.blockSize
    }
  }

  private static let step = PieceWork.pieceLength / ImageLimits.blockSize
  private let blockCounts: [Int]
  /// The number of each region's first piece, and the end.
  private let firsts: [Int]

  /// Pieces of regions whose lengths are multiples of 4 KiB.
  public init(_ regions: [ImageRegion]) { self.init(blockCounts: regions.map(\.blockCount)) }

  /// Pieces of regions of so many 4 KiB blocks.
  init(blockCounts: [Int]) {
    var firsts = [0]
    for count in blockCounts {
      firsts.append(firsts[firsts.count - 1] + (count + Self.step - 1) / Self.step)
    }
    self.blockCounts = blockCounts
    self.firsts = firsts
  }

  /// How many there are.
  public var count: Int { firsts[firsts.count - 1] }

  /// A piece, by its number.
  public subscript(number: Int) -> Piece {
    precondition(number >= 0 && number < count)
    // The last region that begins at or before it: binary search.
    var (low, high) = (0, blockCounts.count)
    while high - low > 1 {
      let middle = (low + high) / 2
      if firsts[middle] <= number { low = middle } else { high = middle }
    }
    let start = (number - firsts[low]) * Self.step
    return Piece(region: low, blocks: start..<min(start + Self.step, blockCounts[low]))
  }
}
