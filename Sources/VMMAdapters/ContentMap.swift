// SPDX-License-Identifier: Apache-2.0

public import GuestMemory
public import LinuxSystem
public import MemoryImage
public import Pager
public import SystemPackage

/// A range of a VMM's memory whose content is one piece of one region of an image.
public struct ContentRange: Sendable, Hashable {
  /// Where it lies in the VMM's address space.
  public let host: HostRange
  /// The unit of a fault.
  public let pageSize: PageSize
  /// Where the guest has it, as the image says.
  public let guestAddress: GuestAddress
  /// The image's region, by its number.
  public let imageRegion: Int
  /// Bytes into that region; a multiple of 4 KiB.
  public let imageOffset: Int
  /// How absent pages are to be filled.
  public let mode: HandedRegion.Mode
  /// What it maps, if that was handed over.
  public let memory: HandedRegion.Memory?
  /// Which region of the hand-over it is from.
  public let handedRegion: Int

  /// The image's blocks of 4 KiB, counted in its region.
  public var blocks: Range<Int> {
    let first = imageOffset / ImageLimits.blockSize
    return first..<first + host.length / ImageLimits.blockSize
  }

  /// The range for a session.
  ///
  /// Throws `invalidArgument` for a clone that is not the whole of its cache, and for a memory file
  /// that did not come; and what the kernel says when there is no memory for the page states.
  /// - Parameter memoryFiles: of the hand-over, for ranges with the mode `.minor`.
  /// - Parameter caches: of the image's regions, if they were offered.
  public func makePagedRegion(
    memoryFiles: [HandedMemoryFile?] = [], caches: [SharedPageCache] = []
  ) throws(Errno) -> PagedRegion {
    var backing: (file: HandedMemoryFile, offset: Int)?
    switch mode {
    case .clone(let number):
      guard caches.indices.contains(number), number == imageRegion, imageOffset == 0,
        caches[number].pageSize == pageSize
      else { throw .invalidArgument }
      return try PagedRegion(
        cloneOf: caches[number], host: host, guestAddress: guestAddress, sourceRegion: imageRegion)
    case .minor:
      guard let memory, memory.file < memoryFiles.count, let file = memoryFiles[memory.file] else {
        throw .invalidArgument
      }
      backing = (file, memory.offset)
    case .missing: break
    }
    return try PagedRegion(
      host: host, pageSize: pageSize, guestAddress: guestAddress, sourceRegion: imageRegion,
      sourceOffset: imageOffset, memory: backing)
  }
}

/// Where the content of handed regions is in an image.
public enum ContentMap {
  /// Cuts handed regions where the image's regions end; sorted by host address.
  ///
  /// Throws `.imageMismatch` when a region asks for what the image does not have, when a
  /// page would come from two regions of the image, and, for regions with offsets, when the
  /// image has memory that no region asks for: then it is of another machine.
  public static func ranges(
    of regions: [HandedRegion], in image: [ImageRegion]
  ) throws(HandoverError) -> [ContentRange] {
    guard let first = regions.first else { return [] }
    let isFlat = if case .offset = first.content { true } else { false }
    let spans = isFlat ? flatSpans(image) : spansByGuestAddress(image)
    var ranges: [ContentRange] = []
    for (number, region) in regions.enumerated() {
      ranges += try cut(region, number: number, spans: spans, image: image)
    }
    // No region overlaps another, so the sums are equal only if all is covered.
    let wanted = regions.reduce(0) { $0 + $1.host.length }
    let there = image.reduce(0) { $0 + $1.length }
    guard !isFlat || wanted == there else {
      throw HandoverError(
        .imageMismatch, "the VM has \(wanted) bytes of memory, and the image \(there)")
    }
    return ranges.sorted { $0.host.start < $1.host.start }
  }

  /// A region of the image on the scale of the handed regions.
  private struct Span {
    let start: UInt64
    let end: UInt64
    let region: Int
  }

  private static func flatSpans(_ image: [ImageRegion]) -> [Span] {
    var start: UInt64 = 0
    return image.enumerated().map { number, region in
      defer { start += UInt64(region.length) }
      return Span(start: start, end: start + UInt64(region.length), region: number)
    }
  }

  private static func spansByGuestAddress(_ image: [ImageRegion]) -> [Span] {
    image.enumerated().map { number, region in
      let start = region.guestAddress.rawValue
      // An image's region may end where the address space does; no handed region does.
      let (end, overflow) = start.addingReportingOverflow(UInt64(region.length))
      return Span(start: start, end: overflow ? .max : end, region: number)
    }.sorted { $0.start < $1.start }
  }

  private static func cut(
    _ region: HandedRegion, number: Int, spans: [Span], image: [ImageRegion]
  ) throws(HandoverError) -> [ContentRange] {
    func mismatch(_ reason: String) -> HandoverError {
      HandoverError(.imageMismatch, reason, region: number)
    }
    var ranges: [ContentRange] = []
    var done = 0
    var index = firstSpan(endingAfter: region.position, in: spans)
    while done < region.host.length {
      let position = region.position + UInt64(done)
      guard index < spans.count, spans[index].start <= position else {
        let place = "\(region.scaleName) 0x\(String(position, radix: 16))"
        throw mismatch("the image has nothing at \(place)")
      }
      let span = spans[index]
      let length = Int(min(UInt64(region.host.length - done), span.end - position))
      guard region.pageSize.divides(length) else {
        throw mismatch(
          "region \(span.region) (\(image[span.region].name)) of the image ends within a page "
            + "of \(region.pageSize)")
      }
      let offset = Int(position - span.start)
      ranges.append(
        ContentRange(
          host: HostRange(start: region.host.start.advanced(by: done), length: length),
          pageSize: region.pageSize,
          guestAddress: image[span.region].guestAddress.advanced(by: offset),
          imageRegion: span.region, imageOffset: offset, mode: region.mode,
          memory: region.memory.map { .init(file: $0.file, offset: $0.offset + done) },
          handedRegion: number))
      done += length
      index += 1
    }
    return ranges
  }

  /// Binary search: VMMs can have hundreds of regions, and images too.
  private static func firstSpan(endingAfter position: UInt64, in spans: [Span]) -> Int {
    var (low, high) = (0, spans.count)
    while low < high {
      let middle = (low + high) / 2
      if spans[middle].end <= position { low = middle + 1 } else { high = middle }
    }
    return low
  }
}

extension HandedRegion {
  var scaleName: String {
    switch content {
    case .offset: "offset"
    case .guestAddress: "guest address"
    }
  }
}
