// SPDX-License-Identifier: Apache-2.0

internal import LinuxSystem
internal import SystemPackage

/// Where the parts of one region are, in the file and in the index's memory. Plain
/// numbers: the hot path copies it.
struct RegionGeometry: Sendable {
  /// Entries of an index page; its last 8 bytes are its checksum.
  static let entriesPerPage = 1022

  /// Blocks of 4 KiB.
  let blockCount: Int
  /// Bytes from the start of the file to the index.
  let indexOffset: Int
  /// The first of its pages in the memory that holds the indexes of all regions.
  let firstIndexPage: Int
  /// A seed (docs/image-format.md, "Checksums").
  let indexKey: UInt64

  /// Pages of the index.
  var indexPageCount: Int { Self.indexPageCount(blockCount: blockCount) }

  static func indexPageCount(blockCount: Int) -> Int {
    (blockCount + entriesPerPage - 1) / entriesPerPage
  }

  /// Blocks that index page `page` is for.
  func blocks(ofIndexPage page: Int) -> Range<Int> {
    let first = page * Self.entriesPerPage
    return first..<min(first + Self.entriesPerPage, blockCount)
  }

  /// Bytes from the start of the file.
  func offset(ofIndexPage page: Int) -> Int { indexOffset + page * ImageLimits.blockSize }

  func seed(ofIndexPage page: Int) -> UInt64 { Checksum.seed(indexKey, position: page) }
}

// MARK: - Rules for regions

extension ImageRegion {
  /// Checks what holds for one region by itself; all arithmetic stays in range after
  /// this.
  func check(number: Int, path: FilePath) throws(ImageError) {
    func invalid(_ reason: String) -> ImageError {
      ImageError(.invalidLayout, path, reason, region: number, regionName: name)
    }
    guard (1...ImageLimits.regionNameBytes).contains(name.utf8.count) else {
      throw invalid("its name must have 1 to \(ImageLimits.regionNameBytes) bytes")
    }
    guard length > 0, pageSize.divides(length) else {
      throw invalid("its length of \(length) bytes is not a multiple of its page size, \(pageSize)")
    }
    guard length <= ImageLimits.fileLength else {
      throw ImageError(
        .limitExceeded, path, "its length is \(length) bytes", region: number, regionName: name)
    }
    guard guestAddress.rawValue % UInt64(ImageLimits.blockSize) == 0 else {
      throw invalid("its guest address \(guestAddress) is not a multiple of 4 KiB")
    }
    // The last byte, so that a region may end where the address space does.
    guard !guestAddress.rawValue.addingReportingOverflow(UInt64(length) - 1).overflow else {
      throw invalid("it passes the end of the guest's address space")
    }
  }

  /// Checks all regions, each by itself and that no two overlap in guest memory.
  static func check(_ regions: [ImageRegion], path: FilePath) throws(ImageError) {
    guard !regions.isEmpty else { throw ImageError(.invalidLayout, path, "it has no regions") }
    guard regions.count <= ImageLimits.regions else {
      throw ImageError(.limitExceeded, path, "it has \(regions.count) regions")
    }
    for (number, region) in regions.enumerated() {
      try region.check(number: number, path: path)
    }
    let ordered = regions.indices.sorted { regions[$0].guestAddress < regions[$1].guestAddress }
    for (left, right) in zip(ordered, ordered.dropFirst()) {
      let distance = regions[right].guestAddress.rawValue - regions[left].guestAddress.rawValue
      guard distance >= UInt64(regions[left].length) else {
        throw ImageError(
          .invalidLayout, path, "it overlaps region \(left) in guest memory", region: right,
          regionName: regions[right].name)
      }
    }
  }
}
