// SPDX-License-Identifier: Apache-2.0

internal import Glibc
internal import LinuxSystem
public import MemoryImage
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

  /// Writes all regions of a source to a file, in place of a file that is there.
  ///
  /// The file is complete and on storage when this returns. When it throws, or when the
  /// process dies, what was there is unchanged and nothing is left behind. Takes 4 MiB of
  /// memory for each thread.
  ///
  /// - Parameters:
  ///   - threads: how many threads read and write, the caller's among them.
  ///   - progress: told after each piece how many bytes of memory are done, and how many there
  ///     are; on any of the threads.
  /// - Throws: what the source throws where that is an `ImportError`, otherwise `source` with
  ///   the error in `cause`; `inputOutput` (`Errno.noSpace` when the disk is full);
  ///   `invalidLayout` for regions that overlap or do not fit the arrangement, and for the path of
  ///   a file that is read.
  public static func write<Source: RegionSource>(
    _ source: Source, to path: FilePath, arrangement: Arrangement = .packed, threads: Int = 2,
    progress: ImageProgress? = nil
  ) throws(ImportError) {
    try source.requireOther(than: path)
    let places = try places(of: source.regions, arrangement, path)
    do {
      let pending = try PendingFile(at: path)
      try pending.descriptor.setLength(places.length)
      let target = Target(descriptor: try pending.descriptor.duplicate())
      let pieces = RegionPieces(source.regions)
      let counter = ByteProgress(total: source.byteCount, progress)
      try unsafe PieceWork(pieces: pieces.count, threads: threads).run(
        name: "export", bufferLength: PieceWork.pieceLength,
        noMemory: {
          ImportError(
            .inputOutput, path, "there is no memory to read with",
            remedy: "Free 4 MiB for each thread, or use fewer.", errno: $0)
        }
      ) { (number, buffer) throws(ImportError) in
        let piece = pieces[number]
        // SAFETY: the buffer is as long as the longest piece, and this thread's.
        if let part = try unsafe source.read(piece, into: buffer, for: path) {
          do throws(Errno) {
            try unsafe writeData(
              part.bytes, to: target.descriptor, at: places.starts[piece.region] + part.offset)
          } catch {
            throw ImportError(.inputOutput, path, "it cannot be written", errno: error)
          }
        }
        counter.add(piece.bytes.count)
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

  /// The file behind a reference that threads share.
  private final class Target: Sendable {
    let descriptor: OwnedDescriptor
    init(descriptor: consuming OwnedDescriptor) { self.descriptor = descriptor }
  }

  // MARK: - Steps

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
