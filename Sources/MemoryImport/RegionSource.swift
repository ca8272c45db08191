// SPDX-License-Identifier: Apache-2.0

public import MemoryImage

/// Memory that can be read region by region.
public protocol RegionSource {
  /// Why reading fails.
  associatedtype Failure: Error

  /// The regions, in their order.
  var regions: [ImageRegion] { get }

  /// Reads part of a region; offset in bytes from its start.
  ///
  /// - Returns: `false` if all of it is known to be zeros: then the buffer is zeros, too. With
  ///   `true` it may still be.
  @unsafe func read(
    region: Int, offset: Int, into buffer: UnsafeMutableRawBufferPointer
  ) throws(Failure) -> Bool

  /// Where the first byte at or after an offset is that may not be zero; `nil` when there is
  /// none. It lets an export go over holes without reading them.
  func nextData(region: Int, from offset: Int) throws(Failure) -> Int?
}

extension RegionSource {
  /// The offset: nothing is known about zeros.
  public func nextData(region: Int, from offset: Int) throws(Failure) -> Int? { offset }
}
