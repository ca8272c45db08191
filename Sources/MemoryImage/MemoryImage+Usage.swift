// SPDX-License-Identifier: Apache-2.0

/// Where the blocks of a region are.
public struct RegionUsage: Sendable, Hashable {
  /// Blocks of zeros.
  public internal(set) var zeroBlocks = 0
  /// Blocks that this image holds; equal ones count each time.
  public internal(set) var ownBlocks = 0
  /// Blocks that an image below holds.
  public internal(set) var inheritedBlocks = 0
}

extension MemoryImage {
  /// Bytes of its file, without those of its ancestors.
  public var fileLength: Int { own.fileLength }

  /// Whether its own chunks are compressed.
  public var isCompressed: Bool { !own.chunks.isStored }

  /// Bytes that are compressed together.
  public var chunkBytes: Int { own.chunks.blocksPerChunk * ImageLimits.blockSize }

  /// Counts a region's blocks by where they are: reads its index, 0.1 % of the region.
  ///
  /// Throws `outOfRange`, `damaged` and `inputOutput`.
  public func usage(ofRegion region: Int) throws(ImageError) -> RegionUsage {
    guard regions.indices.contains(region) else {
      throw ImageError(.outOfRange, path, "it has no region \(region)")
    }
    let geometry = geometries[region]
    var usage = RegionUsage()
    for page in 0..<geometry.indexPageCount {
      let blocks = geometry.blocks(ofIndexPage: page)
      var counts = RegionUsage()
      let outcome = readIndex(geometry, page: page, &counts) { entries in
        var counts = RegionUsage()
        for slot in 0..<blocks.count {
          let entry = entries.half(slot)
          if entry == 0 {
            counts.zeroBlocks += 1
          } else if Int(entry) - 1 >= own.base {
            counts.ownBlocks += 1
          } else {
            counts.inheritedBlocks += 1
          }
        }
        return counts
      }
      guard case .ready = outcome else {
        throw indexFailure(outcome, region: region, block: blocks.lowerBound)
      }
      usage.zeroBlocks += counts.zeroBlocks
      usage.ownBlocks += counts.ownBlocks
      usage.inheritedBlocks += counts.inheritedBlocks
    }
    return usage
  }

  /// Where its own chunks are in its file, in bytes: for benchmarks that decode them by
  /// themselves.
  package var chunkPlaces: [Range<Int>] { own.places(pages) }
}
