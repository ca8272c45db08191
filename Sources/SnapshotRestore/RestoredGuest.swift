// SPDX-License-Identifier: Apache-2.0

internal import Glibc
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
public final class RestoredGuest: RunningGuest {
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
    let saved = try SavedGuest(path, backing: options.backing)
    image = saved.image
    let parts: GuestMemfdParts?
    if options.backing == .guestMemfd {
      guard saved.kind == .kvm else {
        throw SnapshotError(.guest, "guest_memfd is for KVM guests; \(path) holds a process guest")
      }
      let made = try GuestMemfdParts(Self.strategy(options), length: saved.length)
      memory = GuestMemoryHandle(try made.makeMemory(length: saved.length))
      parts = made
    } else if let cache = options.cleanPages {
      parts = nil
      memory = GuestMemoryHandle(try saved.makeClone(of: cache))
    } else {
      parts = nil
      memory = GuestMemoryHandle(try saved.makeMemory(options.backing))
    }
    guestMemfd = parts?.strategy
    session = try Self.makeSession(
      memory.object, image, options, parts?.strategy, vcpus: saved.states.count)
    let binding = try parts?.binding(session, vcpus: saved.states.count)
    preparationNanoseconds = MonotonicClock.nanoseconds - startNanoseconds
    replay =
      options.strategy == .lazy && options.replaysWorkingSet && parts == nil
      ? WorkingSetReplay(of: image, session) : nil
    do throws(SnapshotError) {
      guest = try saved.run(in: memory, handle: parts?.handle, binding: binding)
    } catch {
      session.release()
      replay?.wait()
      throw error
    }
  }

  deinit { shutdown() }

  /// Ends the guest, then its pager. Safe to call again.
  public func shutdown() {
    guest.shutdown()
    session.release()
    replay?.wait()
  }

  // MARK: - Parts

  private static func strategy(
    _ options: RestoreOptions
  ) throws(SnapshotError) -> GuestMemfdStrategy {
    if let asked = options.guestMemfd { asked } else { try GuestMemfdStrategy.probe().strategy }
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
      // The guest's process is this one.
      let process =
        pager.onDamage == .stopVMM
        ? try openProcess(getpid()) : nil
      let session = try PagerSession(
        userfaultfd: try Userfaultfd(wanting: PagerSession<ImageSource>.features.wanted),
        regions: regions, source: ImageSource(image), options: pager, process: process)
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
