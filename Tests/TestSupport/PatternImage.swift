// SPDX-License-Identifier: Apache-2.0

package import LinuxSystem
package import MemoryImage
import SystemPackage

/// An image whose regions, one after the other, hold what `PatternSource` says.
package func makePatternImage(
  _ path: String, regions: [ImageRegion], encoding: ImageEncoding = .zstd(level: 1)
) throws -> MemoryImage {
  let writer = try ImageWriter(
    path: FilePath(path), regions: regions, options: ImageOptions(encoding: encoding))
  var block = 0
  for (number, region) in regions.enumerated() {
    for index in 0..<region.blockCount {
      let words = [UInt64](
        repeating: PatternSource.word(block: block + index, seed: 7), count: 512)
      try unsafe words.withUnsafeBytes { bytes in
        try unsafe writer.blocks.write(region: number, firstBlock: index, bytes: bytes)
      }
    }
    block += region.blockCount
  }
  try writer.finish()
  return try MemoryImage(path: FilePath(path))
}

/// Regions of some numbers of 4 KiB blocks, with gaps in guest memory.
package func imageRegions(_ blocks: [Int], pageSize: PageSize = .size4KiB) -> [ImageRegion] {
  var address: UInt64 = 0
  return blocks.enumerated().map { number, count in
    defer { address += UInt64(count * 4096) + (64 << 20) }
    return ImageRegion(
      name: "ram\(number)", guestAddress: GuestAddress(address), length: count * 4096,
      pageSize: pageSize)
  }
}
