// SPDX-License-Identifier: Apache-2.0

/// Memory that is zero at the start, of any length.
public struct ZeroSource: PageSource {
  /// The source; it has no content, so all are equal.
  public init() {}

  /// All of it, in any region, is zero. Never throws.
  @unsafe public func read(
    region: Int, offset: Int, length: Int, into buffer: UnsafeMutableRawPointer
  ) throws(PageSourceError) -> SourceRun {
    SourceRun(isZero: true, length: length)
  }

  /// As `read`.
  @unsafe public func readAtHand(
    region: Int, offset: Int, length: Int, into buffer: UnsafeMutableRawPointer
  ) throws(PageSourceError) -> SourceRun? {
    SourceRun(isZero: true, length: length)
  }
}

/// Several sources as one: each part of a region comes from a source of its own, such as the
/// memory that a guest was saved with from an image, and what was plugged in since from
/// `ZeroSource`.
///
/// A read ends where its part does and costs a binary search over the parts of the region. What
/// no part covers is an error, never zero.
public struct CompositeSource: PageSource {
  /// Part of a region, and where its content is.
  public struct Part: Sendable {
    /// Bytes of the composite's region; both ends are multiples of 4 KiB.
    public let range: Range<Int>
    /// What is asked for the part.
    public let source: any PageSource
    /// The region of `source`.
    public let sourceRegion: Int
    /// Bytes into that region where the part begins; a multiple of 4 KiB.
    public let sourceOffset: Int

    /// A part that `source` vouches for.
    public init(
      _ range: Range<Int>, from source: any PageSource, region: Int = 0, offset: Int = 0
    ) {
      self.range = range
      self.source = source
      sourceRegion = region
      sourceOffset = offset
    }
  }

  /// The parts of each region, in ascending order.
  public let regions: [[Part]]

  /// The longest of its parts'.
  public let readAhead: Int

  /// A source of parts in any order; there may be gaps.
  ///
  /// Throws when two parts of a region overlap, when one is empty, and when one begins or ends
  /// within 4 KiB.
  /// - Parameter regions: the parts of each region, by its number.
  public init(regions: [[Part]]) throws(PageSourceError) {
    var sorted: [[Part]] = []
    for (number, parts) in regions.enumerated() {
      let parts = parts.sorted { $0.range.lowerBound < $1.range.lowerBound }
      var end = 0
      for part in parts {
        guard !part.range.isEmpty, part.sourceOffset >= 0,
          part.range.lowerBound % 4096 == 0, part.range.upperBound % 4096 == 0,
          part.sourceOffset % 4096 == 0
        else {
          throw PageSourceError(
            "the part \(part.range) of region \(number) is not whole pages of 4 KiB")
        }
        guard part.range.lowerBound >= end else {
          throw PageSourceError(
            "the part \(part.range) of region \(number) overlaps another, or begins below 0")
        }
        end = part.range.upperBound
      }
      sorted.append(parts)
    }
    self.regions = sorted
    readAhead = sorted.joined().map(\.source.readAhead).max() ?? 0
  }

  /// Reads from the part at the offset, up to its end; throws what its source throws.
  @unsafe public func read(
    region: Int, offset: Int, length: Int, into buffer: UnsafeMutableRawPointer
  ) throws(PageSourceError) -> SourceRun {
    let (part, offset, length) = try place(region, offset, length)
    // SAFETY: the caller vouches for room for `length` bytes; no more are asked for.
    return try unsafe part.source.read(
      region: part.sourceRegion, offset: offset, length: length, into: buffer)
  }

  /// As `read`, where the part's source has it at hand.
  @unsafe public func readAtHand(
    region: Int, offset: Int, length: Int, into buffer: UnsafeMutableRawPointer
  ) throws(PageSourceError) -> SourceRun? {
    let (part, offset, length) = try place(region, offset, length)
    // SAFETY: as in `read`.
    return try unsafe part.source.readAtHand(
      region: part.sourceRegion, offset: offset, length: length, into: buffer)
  }

  /// The part that is to be asked, and for what.
  private func place(
    _ region: Int, _ offset: Int, _ length: Int
  ) throws(PageSourceError) -> (part: Part, offset: Int, length: Int) {
    guard regions.indices.contains(region), let part = part(of: regions[region], at: offset)
    else {
      throw PageSourceError("nothing is at offset \(offset) of region \(region)")
    }
    return (
      part, part.sourceOffset + offset - part.range.lowerBound,
      min(length, part.range.upperBound - offset)
    )
  }

  /// The part that holds an offset.
  private func part(of parts: [Part], at offset: Int) -> Part? {
    var (low, high) = (0, parts.count)
    while low < high {
      let middle = (low + high) / 2
      if parts[middle].range.upperBound <= offset { low = middle + 1 } else { high = middle }
    }
    guard low < parts.count, parts[low].range.contains(offset) else { return nil }
    return parts[low]
  }
}
