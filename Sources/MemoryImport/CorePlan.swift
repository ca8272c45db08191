// SPDX-License-Identifier: Apache-2.0

internal import LinuxSystem
internal import MemoryImage
internal import SystemPackage

/// Regions of the segments of a core, and where their bytes are.
struct CorePlan: ~Copyable {
  private(set) var regions: [ImageRegion] = []
  private(set) var pieces: [[InputPiece]] = []
  /// Bytes in memory that the file does not have.
  private(set) var absentBytes = 0

  /// Orders segments by address and joins those without a gap between them.
  init(_ loads: [LoadSegment], kind: CoreFile.Kind, path: FilePath) throws(ImportError) {
    func address(_ load: LoadSegment) -> UInt64 {
      kind == .guest ? load.physicalAddress : load.virtualAddress
    }
    let ordered = loads.indices.sorted {
      (address(loads[$0]), $0) < (address(loads[$1]), $1)
    }
    for index in ordered {
      let load = loads[index]
      let start = address(load)
      try Self.check(load, at: start, kind, path)
      let last = start + (UInt64(load.memoryLength) - 1)
      if let region = regions.last {
        let begin = region.guestAddress.rawValue
        // Both ends inclusive, so that a region may end where the address space does.
        let end = begin + (UInt64(region.length) - 1)
        if start <= end {
          try extendAlias(load, at: start, last: last, kind, path)
          continue
        }
        if start == end + 1 {
          append(load, at: Int(start - begin))
          continue
        }
      }
      let name = (kind == .guest ? "ram@" : "map@") + GuestAddress(start).description
      regions.append(
        ImageRegion(
          name: name, guestAddress: GuestAddress(start), length: 0, pageSize: .size4KiB))
      pieces.append([])
      append(load, at: 0)
    }
  }

  private static func check(
    _ load: LoadSegment, at start: UInt64, _ kind: CoreFile.Kind, _ path: FilePath
  ) throws(ImportError) {
    let name = GuestAddress(start)
    guard start % UInt64(ImageLimits.blockSize) == 0 else {
      throw ImportError(
        .invalidLayout, path, "a segment begins at address \(name)",
        remedy: "Addresses must be multiples of 4096; dump again without a filter.",
        fileOffset: load.headerOffset)
    }
    guard !start.addingReportingOverflow(UInt64(load.memoryLength) - 1).overflow else {
      throw ImportError(
        .invalidLayout, path,
        "the segment at address \(name) passes the end of the address space",
        fileOffset: load.headerOffset)
    }
    guard kind == .process || load.fileLength == load.memoryLength else {
      throw ImportError(
        .unsupported, path,
        "the segment at guest address \(name) has \(load.memoryLength) bytes "
          + "in memory and \(load.fileLength) in the file",
        remedy: "Dump again without -p: with it QEMU does not say where all of the memory is.",
        fileOffset: load.headerOffset)
    }
  }

  /// Adds a segment to the last region, which ends where it begins.
  private mutating func append(_ load: LoadSegment, at offset: Int) {
    let last = regions.count - 1
    regions[last].length += load.memoryLength
    absentBytes += load.memoryLength - load.fileLength
    guard load.fileLength > 0 else { return }
    if let piece = pieces[last].last, piece.end == offset,
      piece.fileOffset + piece.length == load.fileOffset
    {
      pieces[last][pieces[last].count - 1].length += load.fileLength
    } else {
      pieces[last].append(
        InputPiece(offset: offset, length: load.fileLength, fileOffset: load.fileOffset))
    }
  }

  /// A segment that begins in the last region: of a guest, and in the same bytes of the file,
  /// it may lengthen it.
  private mutating func extendAlias(
    _ load: LoadSegment, at start: UInt64, last end: UInt64, _ kind: CoreFile.Kind,
    _ path: FilePath
  ) throws(ImportError) {
    let number = regions.count - 1
    let begin = regions[number].guestAddress.rawValue
    let offset = Int(start - begin)
    // Segments come in the order of their addresses, so it begins in the last piece.
    guard kind == .guest, let piece = pieces[number].last, piece.offset <= offset,
      load.fileOffset - offset == piece.fileOffset - piece.offset
    else {
      throw ImportError(
        .overlap, path, "the segment at address \(GuestAddress(start)) overlaps another one",
        fileOffset: load.headerOffset)
    }
    let more = Int(end - begin) + 1 - regions[number].length
    guard more > 0 else { return }
    regions[number].length += more
    pieces[number][pieces[number].count - 1].length += more
  }
}
