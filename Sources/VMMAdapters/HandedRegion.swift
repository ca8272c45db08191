// SPDX-License-Identifier: Apache-2.0

public import LinuxSystem

/// A range of a VMM's memory, as it was handed over and checked.
public struct HandedRegion: Sendable, Hashable {
  /// Where its content is in an image.
  public enum Content: Sendable, Hashable {
    /// Bytes into the image's regions, one after the other without their gaps: the order of
    /// a raw memory file.
    case offset(Int)
    /// At the same guest-physical addresses.
    case guestAddress(GuestAddress)
  }

  /// A memory object of the hand-over that the range maps.
  public struct Memory: Sendable, Hashable {
    /// Its number among the memory files of the hand-over, from 0.
    public let file: Int
    /// Bytes into it; a multiple of the page size.
    public let offset: Int
  }

  /// How absent pages are to be filled, as the VMM registered the range.
  public enum Mode: Sendable, Hashable {
    /// MISSING: by UFFDIO_COPY.
    case missing
    /// MISSING|MINOR: through the memory file, then UFFDIO_CONTINUE.
    case minor
    /// MISSING|MINOR: from a cache of clean pages that was offered, by UFFDIO_CONTINUE; the
    /// region of the image by its number.
    case clone(Int)
  }

  /// Where it lies in the VMM's address space.
  public let host: HostRange
  /// The unit of a fault: 4 KiB or 2 MiB.
  public let pageSize: PageSize
  /// Where its content is.
  public let content: Content
  /// How its absent pages are to be filled, as its owner registered it.
  public let mode: Mode
  /// What it maps, if that was handed over; never `nil` for `.minor`, always for a clone.
  public let memory: Memory?

  /// The content's first byte on its scale.
  var position: UInt64 {
    switch content {
    case .offset(let offset): UInt64(offset)
    case .guestAddress(let address): address.rawValue
    }
  }
}

/// A region in the numbers of a message, before any check.
struct ClaimedRegion {
  /// Where the content is, on which scale.
  enum Scale { case offset, guestAddress }

  var host: UInt64
  var length: UInt64
  var position: UInt64
  var scale: Scale
  var pageSize: UInt64
  var mode = HandedRegion.Mode.missing
  var memory: (file: Int, offset: UInt64)?

  /// Checks it by itself; all arithmetic stays in range after this.
  func checked(number: Int) throws(HandoverError) -> HandedRegion {
    func invalid(_ reason: String) -> HandoverError {
      HandoverError(.invalidRegions, reason, region: number)
    }
    let pageSize: PageSize
    switch self.pageSize {
    case 4096: pageSize = .size4KiB
    case 2_097_152: pageSize = .size2MiB
    default: throw invalid("its page size of \(self.pageSize) bytes is not 4096 or 2097152")
    }
    let unit = UInt64(pageSize.bytes)
    guard length > 0 else { throw invalid("it is empty") }
    guard length % unit == 0 else {
      throw invalid("its length of \(length) bytes is not a multiple of its page size, \(pageSize)")
    }
    guard host % unit == 0 else {
      throw invalid(
        "its address \(HostAddress(host)) is not a multiple of its page size, \(pageSize)")
    }
    guard host < HandoverLimits.addressSpaceEnd, length <= HandoverLimits.addressSpaceEnd - host
    else {
      throw invalid("\(length) bytes at \(HostAddress(host)) pass the end of the address space")
    }
    guard position % 4096 == 0 else { throw invalid("\(place) is not a multiple of 4096") }
    guard position < HandoverLimits.contentEnd, length <= HandoverLimits.contentEnd - position
    else {
      throw invalid("\(length) bytes at \(place) pass the end of what an image can hold")
    }
    return HandedRegion(
      host: HostRange(start: HostAddress(host), length: Int(length)), pageSize: pageSize,
      content: scale == .offset
        ? .offset(Int(position)) : .guestAddress(GuestAddress(position)),
      mode: mode,
      memory: try memory.map { (memory) throws(HandoverError) in
        guard memory.offset % unit == 0, memory.offset < HandoverLimits.contentEnd else {
          throw invalid("its offset \(memory.offset) in its memory file is not one of a page")
        }
        return HandedRegion.Memory(file: memory.file, offset: Int(memory.offset))
      })
  }

  private var place: String {
    scale == .offset ? "offset \(position)" : "guest address \(GuestAddress(position))"
  }
}

extension HandedRegion {
  /// Checks regions each by itself and that no two overlap in the VMM's address space, or
  /// in what they are filled with.
  static func check(
    _ claims: [ClaimedRegion], limit: Int
  ) throws(HandoverError) -> [HandedRegion] {
    guard !claims.isEmpty else { throw HandoverError(.invalidRegions, "there are no regions") }
    guard claims.count <= limit else {
      throw HandoverError(
        .limitExceeded, "it has \(claims.count) regions, and \(limit) are taken")
    }
    var regions: [HandedRegion] = []
    for (number, claim) in claims.enumerated() {
      guard claim.scale == claims[0].scale else {
        throw HandoverError(
          .invalidRegions, "it has an offset and others a guest address, or the other way round",
          region: number)
      }
      regions.append(try claim.checked(number: number))
    }
    try refuseOverlap(regions, in: "memory") { $0.host.start.rawValue }
    try refuseOverlap(regions, in: "the content that they ask for") { $0.position }
    for file in Set(regions.compactMap { $0.memory?.file }) {
      try refuseOverlap(regions, in: "memory file \(file)") {
        $0.memory?.file == file ? $0.memory.map { UInt64($0.offset) } : nil
      }
    }
    return regions
  }

  /// Regions for which `start` is `nil` lie elsewhere.
  private static func refuseOverlap(
    _ regions: [HandedRegion], in space: String, start: (HandedRegion) -> UInt64?
  ) throws(HandoverError) {
    let places = regions.indices.compactMap { index in start(regions[index]).map { (index, $0) } }
      .sorted { $0.1 < $1.1 }
    for ((left, leftStart), (right, rightStart)) in zip(places, places.dropFirst()) {
      // No overflow: both were checked against the end of their space.
      guard leftStart + UInt64(regions[left].host.length) <= rightStart else {
        throw HandoverError(
          .invalidRegions, "it overlaps region \(min(left, right)) in \(space)",
          region: max(left, right))
      }
    }
  }
}
