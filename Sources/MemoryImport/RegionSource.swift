// SPDX-License-Identifier: Apache-2.0

public import LinuxSystem
public import MemoryImage
internal import SystemPackage

/// Memory that can be read region by region, by several threads at once.
public protocol RegionSource: Sendable {
  /// Why reading fails.
  associatedtype Failure: Error

  /// The regions, in their order.
  var regions: [ImageRegion] { get }

  /// Reads part of a region. Offset (in bytes from the start of the region) and length are
  /// multiples of 4 KiB.
  ///
  /// - Returns: `false` if all of it is known to be zeros: then the buffer is zeros, too. With
  ///   `true` it may still be.
  @unsafe func read(
    region: Int, offset: Int, into buffer: UnsafeMutableRawBufferPointer
  ) throws(Failure) -> Bool

  /// Where the first byte in a range is that may not be zero; `nil` when there is none. It
  /// lets holes be gone over without being read. The range is in bytes from the start of the
  /// region, multiples of 4 KiB.
  func nextData(region: Int, in range: Range<Int>) throws(Failure) -> Int?

  /// The files that are read: what is written of it may not take the place of one.
  var inputFiles: [FileIdentity] { get }
}

extension RegionSource {
  /// None.
  public var inputFiles: [FileIdentity] { [] }

  /// The start of the range: nothing is known about zeros.
  public func nextData(region: Int, in range: Range<Int>) throws(Failure) -> Int? {
    range.isEmpty ? nil : range.lowerBound
  }
}

/// An image is a source, whatever it builds on.
extension MemoryImage: RegionSource {}

extension RegionSource {
  /// Bytes of all regions.
  var byteCount: Int { regions.reduce(0) { $0 + $1.length } }

  /// Refuses to write to what is read, under whichever name.
  func requireOther(than path: FilePath) throws(ImportError) {
    guard let present = FileStatus(at: path), inputFiles.contains(present.identity) else { return }
    throw ImportError(
      .invalidLayout, path, "it is read itself, and would be replaced",
      remedy: "Nothing was written; choose another name.")
  }

  /// Reads a piece from its first data on, rounded down to 4 KiB.
  ///
  /// - Parameters:
  ///   - buffer: at least as long as the piece.
  ///   - includesZeros: whether the caller wants all of the piece, also zeros.
  ///   - path: what is being written, for errors.
  /// - Returns: bytes from the start of the region, and what is there; `nil` for zeros.
  @unsafe func read(
    _ piece: RegionPieces.Piece, into buffer: UnsafeMutableRawBufferPointer,
    includesZeros: Bool = false, for path: FilePath
  ) throws(ImportError) -> (offset: Int, bytes: UnsafeRawBufferPointer)? {
    let range = piece.bytes
    var offset = range.lowerBound
    do throws(Failure) {
      if !includesZeros {
        guard let data = try nextData(region: piece.region, in: range) else { return nil }
        offset = max(offset, data & ~(ImageLimits.blockSize - 1))
      }
      // SAFETY: the caller vouches that the buffer holds the piece.
      let part = unsafe UnsafeMutableRawBufferPointer(
        rebasing: buffer[..<(range.upperBound - offset)])
      let hasData = try unsafe read(region: piece.region, offset: offset, into: part)
      guard hasData || includesZeros else { return nil }
      return (offset, UnsafeRawBufferPointer(part))
    } catch {
      // What names a file and a place needs no more words.
      if let error = error as? ImportError { throw error }
      throw ImportError(
        .source, path,
        "nothing was written, because the memory of region \"\(regions[piece.region].name)\" "
          + "cannot be read at offset \(offset)", cause: error)
    }
  }
}
