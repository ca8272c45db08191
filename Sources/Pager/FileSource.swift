// SPDX-License-Identifier: Apache-2.0

public import LinuxSystem
internal import SystemPackage

/// A raw memory file, such as Firecracker's, as a source: its regions lie in it one after the
/// other.
///
/// It has no checksums, so nothing vouches for its content but the file itself: a page that is
/// past its end, or cannot be read, has no right content; what else stands there is taken. Make an
/// image of it (`faultline image create --from-raw`) where that is not enough. The file must not
/// change while it is used. Holes are zeros (lseek(2), SEEK_DATA).
public final class FileSource: PageSource {
  /// Bytes of each region.
  public let regions: [Int]
  private let file: OwnedDescriptor
  private let starts: [Int]
  private let isInMemory: Bool

  /// A source over an open file.
  ///
  /// Throws when the regions are not whole pages of 4 KiB, or the file is not exactly as long.
  /// - Parameter regions: bytes of each, in the order of the file.
  public init(_ file: consuming OwnedDescriptor, regions: [Int]) throws(PageSourceError) {
    guard regions.allSatisfy({ $0 > 0 && $0 % 4096 == 0 }) else {
      throw PageSourceError("a region of a raw file is not whole pages of 4 KiB")
    }
    let length: Int
    do throws(Errno) {
      length = try file.status.length
    } catch {
      throw PageSourceError("the raw file cannot be looked at: \(error)")
    }
    var starts: [Int] = []
    var end = 0
    for region in regions {
      starts.append(end)
      end += region
    }
    guard length == end else {
      throw PageSourceError("the raw file has \(length) bytes, and its regions \(end)")
    }
    self.regions = regions
    self.starts = starts
    isInMemory = file.isInMemory
    self.file = file
  }

  /// Reads up to the next hole, or says how long the hole is.
  @unsafe public func read(
    region: Int, offset: Int, length: Int, into buffer: UnsafeMutableRawPointer
  ) throws(PageSourceError) -> SourceRun {
    // SAFETY: as the caller vouches.
    guard
      let run = try unsafe read(
        region: region, offset: offset, length: length, into: buffer, waits: true)
    else { throw PageSourceError("offset \(offset) of region \(region) cannot be read") }
    return run
  }

  /// The same, of what is in the page cache; a hole always is.
  @unsafe public func readAtHand(
    region: Int, offset: Int, length: Int, into buffer: UnsafeMutableRawPointer
  ) throws(PageSourceError) -> SourceRun? {
    // SAFETY: as the caller vouches.
    try unsafe read(region: region, offset: offset, length: length, into: buffer, waits: isInMemory)
  }

  @unsafe private func read(
    region: Int, offset: Int, length: Int, into buffer: UnsafeMutableRawPointer, waits: Bool
  ) throws(PageSourceError) -> SourceRun? {
    guard regions.indices.contains(region), offset >= 0, length > 0,
      length <= regions[region] - offset
    else { throw PageSourceError("offset \(offset) of region \(region) lies outside of the file") }
    let start = starts[region] + offset
    do throws(Errno) {
      let found = try file.nextData(from: start)
      // Only a hole to its end follows, or its end came nearer.
      if found == nil, try file.status.length < start + length { throw .noData }
      let data = found ?? start + length
      // Part of a page is data where the filesystem's blocks are smaller.
      let hole = min(data - start, length) & ~4095
      if hole > 0 { return SourceRun(isZero: true, length: hole) }
      let end = try file.nextHole(from: start) ?? start + length
      let wanted = min(max(4096, (end - start + 4095) & ~4095), length)
      // SAFETY: the caller vouches for room for `length` bytes; no more are asked for.
      let got = try unsafe file.read(
        into: UnsafeMutableRawBufferPointer(start: buffer, count: wanted), at: start, waits: waits)
      guard got >= 4096 else {
        // A piece of a page: the rest of it has to be waited for, or is past the end.
        guard waits else { return nil }
        try unsafe file.readAll(
          into: UnsafeMutableRawBufferPointer(start: buffer, count: 4096), at: start)
        return SourceRun(isZero: false, length: 4096)
      }
      return SourceRun(isZero: false, length: got & ~4095)
    } catch .wouldBlock where !waits {
      return nil
    } catch .noData {
      throw PageSourceError("the raw file was cut: nothing is at its offset \(start)")
    } catch {
      throw PageSourceError(
        "the raw file cannot be read at its offset \(start): \(error)", mayRecover: true)
    }
  }
}
