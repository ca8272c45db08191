// SPDX-License-Identifier: Apache-2.0

public import GuestMemory
public import LinuxSystem
public import MemoryImage
public import Snapshot
internal import SystemPackage
public import TestGuest

/// Guest memory behind a shared reference, for a guest and those who take snapshots of it.
public final class GuestMemoryHandle: Sendable {
  /// The memory.
  public let object: GuestMemoryObject

  /// Takes over memory.
  public init(_ object: consuming GuestMemoryObject) { self.object = object }

  /// Where it lies in this process.
  public var range: HostRange { object.range }
  /// What it is made of.
  public var backing: MemoryBacking { object.backing }
}

/// A test guest, as `Snapshotter` wants it.
public final class TestGuestSnapshots: SnapshotGuest {
  /// The type of the device state that holds one vCPU: "vcpu" as a little-endian number.
  public static let vcpuStateType: UInt32 = 0x7570_6376
  /// The metadata key that says what ran the guest: "kvm" or "process".
  public static let kindKey = "guest.kind"

  private let guest: TestGuest
  private let memory: GuestMemoryHandle
  private let skipsAbsentPages: Bool

  /// A guest and its memory.
  ///
  /// - Parameter skipsAbsentPages: `true` when absent pages are zeros; `false` when a pager
  ///   fills them on demand.
  public init(_ guest: TestGuest, _ memory: GuestMemoryHandle, skipsAbsentPages: Bool = true) {
    self.guest = guest
    self.memory = memory
    self.skipsAbsentPages = skipsAbsentPages
  }

  /// One region, "ram" at address 0.
  public var snapshotRegions: [SnapshotRegion] {
    [
      SnapshotRegion(
        image: ImageRegion(
          name: "ram", guestAddress: GuestAddress(0), length: memory.range.length,
          pageSize: memory.backing.pageSize), host: memory.range, backing: memory.backing)
    ]
  }

  /// Stops the vCPUs, within a workload or not.
  public func pause() { guest.pause() }

  /// Lets them go on.
  public func resume() { guest.resume() }

  /// One state for each vCPU.
  public func saveDeviceStates() throws(SnapshotError) -> [DeviceState] {
    do throws(GuestError) {
      return try guest.saveState().enumerated().map { index, state in
        DeviceState(type: Self.vcpuStateType, instance: UInt32(index), bytes: state)
      }
    } catch {
      throw SnapshotError(.guest, error.description)
    }
  }

  /// What ran the guest.
  public func snapshotMetadata() -> [String: String] {
    [Self.kindKey: guest.kind == .kvm ? "kvm" : "process"]
  }

  /// What the kernel says is there.
  public func populatedRanges(ofRegion region: Int) throws(SnapshotError) -> [Range<Int>] {
    guard skipsAbsentPages else { return [0..<memory.range.length] }
    do throws(Errno) {
      return try memory.object.populatedRanges()
    } catch {
      throw SnapshotError(.memory, "The kernel does not say what memory is there: \(error)")
    }
  }
}
