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

  /// Where this process has a page. Allocates nothing.
  func address(of page: Int) -> HostAddress {
    let region = regions[region(of: page)]
    return region.region.host.start.advanced(by: (page - region.firstPage) * 4096)
  }

  /// The error about a page that cannot be read.
  func unreadable(_ page: Int) -> SnapshotError {
    let region = regions[region(of: page)]
    let offset = (page - region.firstPage) * 4096
    let address = region.region.image.guestAddress.rawValue + UInt64(offset)
    return SnapshotError(
      .memory,
      "The guest's page at 0x\(String(address, radix: 16)) (\"\(region.region.image.name)\" + "
        + "0x\(String(offset, radix: 16))) cannot be read: it is poisoned, or its file was cut. "
        + "An image would lack it")
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
