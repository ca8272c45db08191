// SPDX-License-Identifier: Apache-2.0

internal import Glibc
internal import LinuxSystem
internal import MemoryImage
public import SystemPackage

/// Writes memory as a raw file: as a whole or not at all, with holes for pages of zeros.
public enum RawExport {
  /// Where regions are in the file.
  public enum Arrangement: Sendable, Hashable {
    /// One after the other, in their order: what `MemoryInput.raw` and Firecracker read.
    case packed
    /// At their guest addresses, counted from `base`; gaps are holes.
    case byAddress(base: UInt64 = 0)
  }

  /// Bytes that are read and written at a time.
  private static let step = 1 << 20

  /// Writes all regions of a source to a file, in place of a file that is there.
  ///
  /// The file is complete and on storage when this returns. When it throws, or when the
  /// process dies, what was there is unchanged and nothing is left behind. Uses 1 MiB of
  /// memory.
  ///
  /// - Parameters:
  ///   - progress: told after each MiB of data, and after each hole, how many bytes of memory are
  ///     done and how many there are.
  /// - Throws: `source` when the source fails, with what it threw in `cause`; `inputOutput`
  ///   (`Errno.noSpace` when the disk is full); `invalidLayout` for regions that overlap or do
  ///   not fit the arrangement.
  public static func write<Source: RegionSource>(
    _ source: Source, to path: FilePath, arrangement: Arrangement = .packed,
    progress: (_ done: Int, _ total: Int) -> Void = { _, _ in }
  ) throws(ImportError) {
    let regions = source.regions
    let places = try places(of: regions, arrangement, path)
    do {
      let pending = try PendingFile(at: path)
      try pending.descriptor.setLength(places.length)
      let buffer = try Mapping(anonymous: step)
      let total = regions.reduce(0) { $0 + $1.length }
      var done = 0
      progress(done, total)
      for (number, region) in regions.enumerated() {
        var offset = 0
        while offset < region.length {
          let data = try next(source, number, offset, path) ?? region.length
          // Whole pages; also of a source whose holes end elsewhere.
          let start = max(offset, min(data, region.length) & ~(ImageLimits.blockSize - 1))
          // SAFETY: the mapping is one step long.
          let bytes = unsafe UnsafeMutableRawBufferPointer(
            start: buffer.pointer, count: min(step, region.length - start))
          if start < region.length, try unsafe read(source, number, start, bytes, path) {
            try unsafe writeData(
              UnsafeRawBufferPointer(bytes), to: pending.descriptor,
              at: places.starts[number] + start)
          }
          done += start + bytes.count - offset
          offset = start + bytes.count
          progress(done, total)
        }
      }
      // The data first, then the name: a crash leaves the old file or the new one.
      try pending.descriptor.synchronize()
      try pending.publish().synchronize()
    } catch let error as ImportError {
      throw error
    } catch {
      throw ImportError(.inputOutput, path, "it cannot be written", errno: error as? Errno)
    }
  }

  // MARK: - Steps

  private static func next<Source: RegionSource>(
    _ source: Source, _ region: Int, _ offset: Int, _ path: FilePath
  ) throws(ImportError) -> Int? {
    do throws(Source.Failure) {
      return try source.nextData(region: region, from: offset)
    } catch {
      throw unreadable(source.regions[region], offset, error, path)
    }
  }

  @unsafe private static func read<Source: RegionSource>(
    _ source: Source, _ region: Int, _ offset: Int, _ buffer: UnsafeMutableRawBufferPointer,
    _ path: FilePath
  ) throws(ImportError) -> Bool {
    do throws(Source.Failure) {
      // SAFETY: the caller vouches for the buffer.
      return try unsafe source.read(region: region, offset: offset, into: buffer)
    } catch {
      throw unreadable(source.regions[region], offset, error, path)
    }
  }

  private static func unreadable(
    _ region: ImageRegion, _ offset: Int, _ cause: any Error, _ path: FilePath
  ) -> ImportError {
    ImportError(
      .source, path,
      "nothing was written, because the memory of region \"\(region.name)\" "
        + "cannot be read at offset \(offset)", cause: cause)
  }

  /// Writes the pages that are not zero, neighbours together.
  @unsafe private static func writeData(
    _ bytes: UnsafeRawBufferPointer, to file: borrowing OwnedDescriptor, at offset: Int
  ) throws(Errno) {
    let page = ImageLimits.blockSize
    var start = 0
    while start < bytes.count {
      var end = start
      // SAFETY: all of it lies in the buffer, whose length is a multiple of the page size.
      while end < bytes.count,
        unsafe !isZero(UnsafeRawBufferPointer(rebasing: bytes[end..<end + page]))
      {
        end += page
      }
      if end > start {
        try unsafe file.writeAll(
          UnsafeRawBufferPointer(rebasing: bytes[start..<end]), at: offset + start)
      }
      // The page that ended the run is zero.
      start = end + page
    }
  }

  @unsafe private static func isZero(_ page: UnsafeRawBufferPointer) -> Bool {
    guard let start = page.baseAddress else { return true }
    // SAFETY: the page is compared with itself, shifted by a byte.
    return unsafe page[0] == 0 && memcmp(start, start + 1, page.count - 1) == 0
  }

  private static func places(
    of regions: [ImageRegion], _ arrangement: Arrangement, _ path: FilePath
  ) throws(ImportError) -> (starts: [Int], length: Int) {
    try regions.check(path: path)
    var starts: [Int] = []
    var length = 0
    for region in regions {
      var start = length
      if case .byAddress(let base) = arrangement {
        let address = region.guestAddress.rawValue
        guard address >= base, address - base <= UInt64(ImportLimits.length) else {
          throw ImportError(
            .invalidLayout, path,
            "region \"\(region.name)\" is at \(region.guestAddress), which "
              + "has no place in a file that begins at \(GuestAddress(base))",
            remedy: "Export the regions one after the other, or begin at another address.")
        }
        start = Int(address - base)
      }
      starts.append(start)
      length = max(length, start + region.length)
    }
    guard length <= ImportLimits.length else {
      throw ImportError(
        .limitExceeded, path, "it would have \(length) bytes; \(ImportLimits.length) are the limit"
      )
    }
    return (starts, length)
  }
}
