// SPDX-License-Identifier: Apache-2.0

internal import LinuxSystem

/// Where the pages of tracked regions lie, and the pieces in which they are worked on.
struct TrackedLayout: Sendable {
  struct Region: Sendable {
    let host: HostRange
    let backing: MemoryBacking
    /// The number of its first page.
    let firstPage: Int
    /// 4 KiB pages of one page of the backing.
    let unit: Int

    var pages: Range<Int> { firstPage..<firstPage + host.length / 4096 }

    func range(of pages: Range<Int>) -> HostRange {
      HostRange(
        start: host.start.advanced(by: (pages.lowerBound - firstPage) * 4096),
        length: pages.count * 4096)
    }

    /// Whole pages of the backing.
    func rounded(_ pages: Range<Int>) -> Range<Int> {
      let (lower, upper) = (pages.lowerBound - firstPage, pages.upperBound - firstPage)
      return firstPage + lower / unit * unit..<firstPage + (upper + unit - 1) / unit * unit
    }
  }

  /// A few consecutive pages of one region that are dealt with in one call.
  struct Piece {
    let pages: Range<Int>
    let host: HostRange
    /// The number of the piece; pieces of one page always have the same.
    let number: Int
  }

  let regions: [Region]
  let pageCount: Int

  init(_ tracked: [TrackedRegion]) throws(DirtyTrackingError) {
    var regions: [Region] = []
    var pageCount = 0
    for region in tracked {
      let size = region.backing.pageSize
      guard region.host.length > 0, size.divides(region.host.length),
        size.divides(Int(truncatingIfNeeded: region.host.start.rawValue))
      else {
        throw DirtyTrackingError(
          .invalidArgument, "\(region.host) is not a range of whole pages of \(size)")
      }
      regions.append(
        Region(
          host: region.host, backing: region.backing, firstPage: pageCount,
          unit: size.bytes / 4096))
      pageCount += region.host.length / 4096
    }
    self.regions = regions
    self.pageCount = pageCount
  }

  func require(_ pages: Range<Int>) throws(DirtyTrackingError) {
    guard pages.lowerBound >= 0, pages.upperBound <= pageCount else {
      throw DirtyTrackingError(
        .invalidArgument, "Pages \(pages) are not among the \(pageCount) that are tracked")
    }
  }

  /// The whole page of the backing that has an address. Allocates nothing.
  func place(of address: HostAddress, piecePages: Int) -> Piece? {
    for index in regions.indices where regions[index].host.contains(address) {
      let region = regions[index]
      let page = region.firstPage + region.host.start.distance(to: address) / 4096
      let pages = region.rounded(page..<page + 1)
      return Piece(
        pages: pages, host: region.range(of: pages),
        number: Self.number(region, pages.lowerBound, piecePages))
    }
    return nil
  }

  /// Cuts pages into pieces of at most `piecePages`, or of one page of the backing.
  func forEachPiece<Failure: Error>(
    of pages: Range<Int>, piecePages: Int, _ body: (Piece) throws(Failure) -> Void
  ) throws(Failure) {
    for region in regions where region.pages.overlaps(pages) {
      let part = region.rounded(region.pages.clamped(to: pages))
      let step = max(piecePages, region.unit)
      var page = part.lowerBound
      while page < part.upperBound {
        let boundary = region.firstPage + ((page - region.firstPage) / step + 1) * step
        let end = min(boundary, part.upperBound)
        try body(
          Piece(
            pages: page..<end, host: region.range(of: page..<end),
            number: Self.number(region, page, piecePages)))
        page = end
      }
    }
  }

  private static func number(_ region: Region, _ page: Int, _ piecePages: Int) -> Int {
    (page - region.firstPage) / max(piecePages, region.unit)
  }
}
