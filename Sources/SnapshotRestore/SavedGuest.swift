// SPDX-License-Identifier: Apache-2.0

internal import GuestMemory
internal import HandoverClient
internal import LinuxSystem
internal import MemoryImage
internal import Pager
internal import Snapshot
internal import SystemPackage
internal import TestGuest

/// A test guest in an image, and what it takes to let it run again, whoever serves its memory.
struct SavedGuest {
  /// Where it is.
  let image: MemoryImage
  /// What ran it.
  let kind: TestGuest.Kind
  /// Its vCPUs, in their order.
  let states: [[UInt8]]
  /// Bytes of its memory.
  let length: Int

  /// Opens an image.
  ///
  /// - Parameter backing: of the memory that it is to have.
  init(_ path: FilePath, backing: MemoryBacking) throws(SnapshotError) {
    do throws(ImageError) {
      image = try MemoryImage(path: path)
    } catch {
      throw SnapshotError(.image, error.description)
    }
    kind = try Self.kind(of: image)
    states = image.states.filter { $0.type == TestGuestSnapshots.vcpuStateType }
      .sorted { $0.instance < $1.instance }.map(\.bytes)
    guard let region = image.regions.first, image.regions.count == 1 else {
      throw SnapshotError(.image, "\(path) has \(image.regions.count) regions; a test guest has 1")
    }
    guard backing.pageSize.divides(region.length) else {
      throw SnapshotError(
        .memory,
        "\(region.length) bytes of guest memory are no whole number of \(backing.pageSize) pages")
    }
    length = region.length
  }

  private static func kind(of image: MemoryImage) throws(SnapshotError) -> TestGuest.Kind {
    switch image.metadata[TestGuestSnapshots.kindKey] {
    case "kvm":
      guard TestGuest.kvmIsAvailable() else {
        throw SnapshotError(
          .guest,
          "\(image.path) holds a KVM guest, and /dev/kvm cannot be used here. "
            + "Run `faultline doctor`, or make a snapshot with --guest process.")
      }
      return .kvm
    case "process": return .process
    default:
      throw SnapshotError(.image, "\(image.path) is an image, but not of a test guest")
    }
  }

  /// Memory for it, with nothing in it.
  func makeMemory(_ backing: MemoryBacking) throws(SnapshotError) -> GuestMemoryObject {
    do throws(Errno) {
      return try GuestMemoryObject(backing: backing, length: length)
    } catch {
      let pages = length / backing.pageSize.bytes
      let advice =
        backing.pageSize == .size4KiB
        ? "Free memory, or raise the limit of this process (ulimit -v, the cgroup's memory.max)."
        : "It needs \(pages) free pages of \(backing.pageSize): write their number to "
          + "/proc/sys/vm/nr_hugepages."
      throw SnapshotError(
        .memory, "\(length >> 20) MiB of \(backing) memory cannot be had: \(error). \(advice)")
    }
  }

  /// A clone's mapping of clean pages.
  func makeClone(of cache: SharedPageCache) throws(SnapshotError) -> GuestMemoryObject {
    do throws(Errno) {
      guard cache.length == length else { throw .invalidArgument }
      return GuestMemoryObject(cloneMapping: try cache.makeMapping(), pageSize: cache.pageSize)
    } catch {
      throw SnapshotError(.memory, "a clone of \(length >> 20) MiB cannot be mapped: \(error)")
    }
  }

  /// A clone's mapping of clean pages that a service has.
  func makeClone(of region: OpenedImage.Region) throws(SnapshotError) -> GuestMemoryObject {
    do throws(Errno) {
      return GuestMemoryObject(
        cloneMapping: try region.makeMapping(), pageSize: region.pageSize)
    } catch {
      let advice =
        region.pageSize == .size4KiB
        ? "" : ". What it may write takes \(length / region.pageSize.bytes) free huge pages"
      throw SnapshotError(
        .memory, "a clone of \(length >> 20) MiB cannot be mapped: \(error)\(advice)")
    }
  }

  /// Lets it run in memory whose faults are served.
  func run(
    in memory: GuestMemoryHandle, handle: GuestMachineHandle? = nil,
    binding: GuestMemfdBinding? = nil
  ) throws(SnapshotError) -> TestGuest {
    do throws(GuestError) {
      return try TestGuest(
        restoring: memory.range, states: states, kind: kind, handle: handle, binding: binding)
    } catch {
      throw SnapshotError(.guest, error.description)
    }
  }
}
