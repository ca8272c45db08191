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
}
