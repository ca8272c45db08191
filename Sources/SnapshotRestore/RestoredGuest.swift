// SPDX-License-Identifier: Apache-2.0

public import GuestMemory
internal import LinuxSystem
public import MemoryImage
public import Pager
public import Snapshot
public import SystemPackage
public import TestGuest
internal import Userfault

/// How a guest gets its memory back.
public enum RestoreStrategy: String, Sendable, CaseIterable {
  /// The guest runs at once; pages come when they are touched.
  case lazy
  /// All memory is there before the guest runs.
  case eager
}

/// How to restore a guest.
public struct RestoreOptions: Sendable {
  /// What its memory is made of.
  public var backing: MemoryBacking
  /// How absent pages are filled.
  public var mode: ResolutionMode
  /// When.
  public var strategy: RestoreStrategy
  /// With guest_memfd: how pages come; `nil` takes the best one that works here.
  public var guestMemfd: GuestMemfdStrategy?
  /// Makes the guest a clone: its clean pages are those of the cache, of which there is one for
  /// the image's region. `backing` and `mode` do not count then.
  public var cleanPages: SharedPageCache?
  /// Whether the image's working set is brought while the guest starts.
  public var replaysWorkingSet = true
  /// The threads and callbacks of the pager.
  public var pager: PagerOptions
  /// Called while an eager restore fills memory: bytes done and in all.
  public var progress: (@Sendable (_ done: Int, _ total: Int) -> Void)?

  /// Options; the defaults restore lazily into anonymous memory by UFFDIO_COPY.
  public init(
    backing: MemoryBacking = .anonymous, mode: ResolutionMode = .missing,
    strategy: RestoreStrategy = .lazy, pager: PagerOptions = PagerOptions(),
    progress: (@Sendable (_ done: Int, _ total: Int) -> Void)? = nil
  ) {
    self.backing = backing
    self.mode = mode
    self.strategy = strategy
    self.pager = pager
    self.progress = progress
  }
}

/// A test guest that runs again from an image, with the pager that serves its memory.
///
/// Owns the memory, the session and the guest, and ends them in the order that leaves
/// no vCPU in a fault that nobody serves: the guest first, while faults are served, then
/// the session, then the memory.
public final class RestoredGuest: Sendable {
  /// The image that it came from.
  public let image: MemoryImage
  /// The pager.
  public let session: PagerSession<ImageSource>
  /// The guest, running.
  public let guest: TestGuest
  /// Its memory.
  public let memory: GuestMemoryHandle
  /// Brings the working set; `nil` when there is none.
  private let replay: WorkingSetReplay?
  /// How the pages of a guest_memfd come; `nil` for other memory.
  public let guestMemfd: GuestMemfdStrategy?
  /// From the beginning of the restore to the guest's creation: CLOCK_MONOTONIC
  /// nanoseconds.
  public let preparationNanoseconds: UInt64
  /// When the restore began: CLOCK_MONOTONIC nanoseconds.
  public let startNanoseconds: UInt64

  /// Opens an image and lets its guest run.
  public init(_ path: FilePath, _ options: RestoreOptions = RestoreOptions()) throws(SnapshotError)
  {
    startNanoseconds = MonotonicClock.nanoseconds
    do throws(ImageError) {
      image = try MemoryImage(path: path)
    } catch {
      throw SnapshotError(.image, error.description)
    }
    let kind = try Self.kind(of: image)
    let states = image.states.filter { $0.type == TestGuestSnapshots.vcpuStateType }
      .sorted { $0.instance < $1.instance }.map(\.bytes)
    guard let region = image.regions.first, image.regions.count == 1 else {
      throw SnapshotError(.image, "\(path) has \(image.regions.count) regions; a test guest has 1")
    }
    guard options.backing.pageSize.divides(region.length) else {
      throw SnapshotError(
        .memory,
        "\(region.length) bytes of guest memory are no whole number of \(options.backing.pageSize) "
          + "pages")
    }
    let parts: GuestMemfdParts?
    if options.backing == .guestMemfd {
      guard kind == .kvm else {
        throw SnapshotError(.guest, "guest_memfd is for KVM guests; \(path) holds a process guest")
      }
      let made = try GuestMemfdParts(Self.strategy(options), length: region.length)
      memory = GuestMemoryHandle(try made.makeMemory(length: region.length))
      parts = made
    } else if let cache = options.cleanPages {
      parts = nil
      memory = GuestMemoryHandle(try Self.makeClone(cache, region.length))
    } else {
      parts = nil
      memory = GuestMemoryHandle(try Self.makeMemory(options.backing, region.length))
    }
    guestMemfd = parts?.strategy
    session = try Self.makeSession(
      memory.object, image, options, parts?.strategy, vcpus: states.count)
    let binding = try parts?.binding(session, vcpus: states.count)
    preparationNanoseconds = MonotonicClock.nanoseconds - startNanoseconds
    replay =
      options.strategy == .lazy && options.replaysWorkingSet && parts == nil
      ? WorkingSetReplay(of: image, session) : nil
    do throws(GuestError) {
      guest = try TestGuest(
        restoring: memory.range, states: states, kind: kind, handle: parts?.handle,
        binding: binding)
    } catch {
      session.release()
      replay?.wait()
      throw SnapshotError(.guest, error.description)
    }
  }

  deinit { shutdown() }

  /// Ends the guest, then its pager. Safe to call again.
  public func shutdown() {
    guest.shutdown()
    session.release()
    replay?.wait()
  }

  /// Waits for the guest's first instruction; nanoseconds since the restore began.
  public func timeToFirstInstruction() throws(SnapshotError) -> UInt64 {
    do throws(GuestError) {
      _ = try guest.timeToFirstInstruction()
    } catch {
      throw SnapshotError(.guest, error.description)
    }
    return (guest.firstInstructionNanoseconds ?? startNanoseconds) - startNanoseconds
  }

  // MARK: - Parts

  private static func strategy(
    _ options: RestoreOptions
  ) throws(SnapshotError) -> GuestMemfdStrategy {
    if let asked = options.guestMemfd { asked } else { try GuestMemfdStrategy.probe().strategy }
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

  private static func makeMemory(
    _ backing: MemoryBacking, _ length: Int
  ) throws(SnapshotError) -> GuestMemoryObject {
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

  private static func makeClone(
    _ cache: SharedPageCache, _ length: Int
  ) throws(SnapshotError) -> GuestMemoryObject {
    do throws(Errno) {
      guard cache.length == length else { throw .invalidArgument }
      return GuestMemoryObject(cloneMapping: try cache.makeMapping(), pageSize: cache.pageSize)
    } catch {
      throw SnapshotError(.memory, "a clone of \(length >> 20) MiB cannot be mapped: \(error)")
    }
  }

  private static func makeSession(
    _ memory: borrowing GuestMemoryObject, _ image: MemoryImage, _ options: RestoreOptions,
    _ guestMemfd: GuestMemfdStrategy?, vcpus: Int
  ) throws(SnapshotError) -> PagerSession<ImageSource> {
    do {
      var pager = options.pager
      var regions: [PagedRegion] = []
      switch guestMemfd {
      case .aheadOfTime?:
        // Nothing is left to serve.
        try AheadOfTimeFill(image, length: memory.range.length).run(
          into: memory.range, threads: pager.populateThreads, progress: options.progress)
      case .threeWay?:
        pager.stageTwoThreads = vcpus
        regions = [try PagedRegion(memory, mode: .missing, stageTwo: true)]
      case .twoWay?, nil:
        if let cache = options.cleanPages {
          regions = [try PagedRegion(cloneOf: cache, host: memory.range)]
        } else {
          regions = [try PagedRegion(memory, mode: options.mode)]
        }
      }
      let session = try PagerSession(
        userfaultfd: try Userfaultfd(wanting: PagerSession<ImageSource>.features.wanted),
        regions: regions, source: ImageSource(image), options: pager)
      try session.start()
      if options.strategy == .eager {
        do {
          try session.populate(progress: options.progress)
        } catch {
          // Damaged pages are poisoned; the guest runs and is told when it touches one.
          guard error.code == .damagedPages else {
            session.release()
            throw error
          }
        }
      }
      return session
    } catch let error as SnapshotError {
      throw error
    } catch let error as Errno where error == .invalidArgument && options.mode == .minor {
      throw SnapshotError(
        .memory, "\(options.backing) memory has no minor faults; use memfd or hugetlb memory")
    } catch {
      throw SnapshotError(.pager, "\(error)")
    }
  }
}
