// SPDX-License-Identifier: Apache-2.0

public import LinuxSystem

/// How the guest memory of two images differs; device states and metadata do not count.
///
/// Memory is matched by its guest address, whatever the regions are called. What the index
/// proves to be equal is not read: zeros in both, and the same stored block of an image that
/// both are or build on. So two images of a chain are compared in the time that their changes
/// take. Everything else is read, checked, and compared byte by byte.
public struct ImageDifference: Sendable {
  /// Where a part begins in an image.
  public struct Place: Sendable, Hashable {
    /// The region's number.
    public let region: Int
    /// The number of a 4 KiB block in the region.
    public let firstBlock: Int
  }

  /// A stretch of guest memory that lies in one region of each image that has it.
  public struct Part: Sendable {
    /// Where it begins.
    public let guestAddress: GuestAddress
    /// Blocks of 4 KiB, at least one.
    public let blockCount: Int
    /// Where the first image has it; `nil` if it does not.
    public let first: Place?
    /// Where the second image has it; `nil` if it does not.
    public let second: Place?

    /// Blocks that both have and that differ, counted from the start of the part.
    public internal(set) var differing = BlockSet()
    /// How many of these are zeros in the first image.
    public internal(set) var zeroInFirst = 0
    /// How many of these are zeros in the second image.
    public internal(set) var zeroInSecond = 0
    /// Blocks that had to be read to know.
    public internal(set) var comparedBlocks = 0

    /// Whether both images have it.
    public var isInBoth: Bool { first != nil && second != nil }
    /// Whether both images have it, with the same content.
    public var isEqual: Bool { isInBoth && differing.isEmpty }
  }

  /// All memory that at least one of the images has, ordered by address.
  public internal(set) var parts: [Part]

  /// Whether both images have the same memory, with the same content.
  public var isEqual: Bool { parts.allSatisfy(\.isEqual) }

  /// Blocks that both images have.
  public var commonBlocks: Int { parts.reduce(0) { $0 + ($1.isInBoth ? $1.blockCount : 0) } }

  /// Blocks that both have and that differ.
  public var differingBlocks: Int { parts.reduce(0) { $0 + $1.differing.count } }
}

// MARK: - Matching by address

extension ImageDifference {
  /// What is left of a region.
  private struct Span {
    let region: Int
    let address: UInt64
    /// The first address that is left, and the last one: a region may end where the address
    /// space does.
    var start: UInt64
    let last: UInt64

    init(_ number: Int, _ region: ImageRegion) {
      self.region = number
      address = region.guestAddress.rawValue
      start = address
      last = address + (UInt64(region.length) - 1)
    }

    var place: Place {
      Place(region: region, firstBlock: Int(start - address) / ImageLimits.blockSize)
    }
  }

  /// Cuts the memory of two images where a region of either begins or ends.
  static func parts(_ first: [ImageRegion], _ second: [ImageRegion]) -> [Part] {
    var rest = [first, second].map { regions in
      // The last comes first, so that it can be taken from the end.
      regions.enumerated().map { Span($0.offset, $0.element) }.sorted { $0.start > $1.start }
    }
    var parts: [Part] = []
    while let start = rest.compactMap(\.last?.start).min() {
      // Up to the end of what begins here, or to where the other one begins.
      var end = UInt64.max
      for spans in rest {
        guard let span = spans.last else { continue }
        end = min(end, span.start == start ? span.last : span.start - 1)
      }
      var places: [Place?] = []
      for side in rest.indices {
        guard let span = rest[side].last, span.start == start else {
          places.append(nil)
          continue
        }
        places.append(span.place)
        if span.last == end {
          rest[side].removeLast()
        } else {
          rest[side][rest[side].count - 1].start = end + 1
        }
      }
      parts.append(
        Part(
          guestAddress: GuestAddress(start),
          blockCount: Int((end - start) / UInt64(ImageLimits.blockSize)) + 1,
          first: places[0], second: places[1]))
    }
    return parts
  }
}
