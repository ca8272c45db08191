// SPDX-License-Identifier: Apache-2.0

internal import GuestMemory
internal import LinuxSystem
internal import MemoryImage

/// Where the pages of a guest lie. They are numbered as the trackers do it: in units of
/// 4 KiB, region after region.
struct SnapshotLayout: Sendable {
  struct Region: Sendable {
    let region: SnapshotRegion
    let firstPage: Int
    /// 4 KiB pages of one page of the backing, which is what a write fault is about.
    let unit: Int
    var pages: Range<Int> { firstPage..<firstPage + region.host.length / 4096 }
  }

  let regions: [Region]
  let pageCount: Int

  init(_ regions: [SnapshotRegion]) {
    var laidOut: [Region] = []
    var pageCount = 0
    for region in regions {
      laidOut.append(
        Region(
          region: region, firstPage: pageCount, unit: region.backing.pageSize.bytes / 4096))
      pageCount += region.host.length / 4096
    }
    self.regions = laidOut
    self.pageCount = pageCount
  }

  var imageRegions: [ImageRegion] { regions.map(\.region.image) }

  var trackedRegions: [TrackedRegion] {
    regions.map { TrackedRegion(host: $0.region.host, backing: $0.region.backing) }
  }

  /// The number of the region that has a page. Allocates nothing.
  func region(of page: Int) -> Int {
    var index = 0
    while page >= regions[index].pages.upperBound { index += 1 }
    return index
  }

  /// The guest's page.
  @unsafe func pointer(_ page: Int) -> UnsafeRawPointer {
    let region = regions[region(of: page)]
    let address =
      UInt(region.region.host.start.rawValue) + UInt((page - region.firstPage) * 4096)
    // SAFETY: the guest keeps its memory mapped, and no mapping begins at address 0.
    return unsafe UnsafeRawPointer(bitPattern: address).unsafelyUnwrapped
  }

  /// All pages of the backing that have one of the pages.
  func rounded(_ pages: DirtyBitmap) -> DirtyBitmap {
    guard regions.contains(where: { $0.unit > 1 }) else { return pages }
    var result = pages
    for region in regions where region.unit > 1 {
      for run in pages.ranges(in: region.pages) {
        let lower = (run.lowerBound - region.firstPage) / region.unit * region.unit
        let upper = (run.upperBound - region.firstPage + region.unit - 1) / region.unit
        result.insert(region.firstPage + lower..<region.firstPage + upper * region.unit)
      }
    }
    return result
  }

  /// The pages that may hold something else than zeros.
  func populated(of guest: any SnapshotGuest) throws(SnapshotError) -> DirtyBitmap {
    var result = DirtyBitmap(pageCount: pageCount)
    for (index, region) in regions.enumerated() {
      for range in try guest.populatedRanges(ofRegion: index) where !range.isEmpty {
        let last = min((range.upperBound + 4095) / 4096, region.pages.count)
        result.insert(region.firstPage + range.lowerBound / 4096..<region.firstPage + last)
      }
    }
    return result
  }
}
