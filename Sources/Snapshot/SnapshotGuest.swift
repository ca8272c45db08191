// SPDX-License-Identifier: Apache-2.0

public import GuestMemory
public import LinuxSystem
public import MemoryImage

/// A part of a guest's memory, as the image names it and as this process maps it.
public struct SnapshotRegion: Hashable, Sendable {
  /// The region of the image.
  public var image: ImageRegion
  /// Where this process maps it; as long as the region.
  public var host: HostRange
  /// What it is made of.
  public var backing: MemoryBacking

  /// A part of a guest's memory, which stays mapped as long as snapshots are taken of it.
  public init(image: ImageRegion, host: HostRange, backing: MemoryBacking) {
    self.image = image
    self.host = host
    self.backing = backing
  }
}

/// What a snapshot wants of a virtual machine; a VMM implements it.
///
/// The calls come from the thread that takes the snapshot, one after the other.
public protocol SnapshotGuest: AnyObject, Sendable {
  /// The guest's memory; always the same.
  var snapshotRegions: [SnapshotRegion] { get }

  /// Stops all vCPUs and everything else that writes to guest memory; returns when nothing
  /// writes any more. A guest that is paused already stays so.
  func pause() throws(SnapshotError)

  /// Lets the guest go on.
  func resume()

  /// What of the guest is not memory, as it is now; the guest is paused.
  func saveDeviceStates() throws(SnapshotError) -> [DeviceState]

  /// Strings to keep with the image: of the guest as it is now; the guest is paused.
  func snapshotMetadata() -> [String: String]

  /// The parts of a region that may hold something else than zeros: bytes from its start, in
  /// order. The guest may be running; what it writes after the call need not be there.
  func populatedRanges(ofRegion region: Int) throws(SnapshotError) -> [Range<Int>]
}

extension SnapshotGuest {
  /// The whole region.
  public func populatedRanges(ofRegion region: Int) throws(SnapshotError) -> [Range<Int>] {
    [0..<snapshotRegions[region].host.length]
  }

  /// None.
  public func snapshotMetadata() -> [String: String] { [:] }
}
