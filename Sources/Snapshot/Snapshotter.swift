// SPDX-License-Identifier: Apache-2.0

public import GuestMemory
internal import LinuxSystem
public import MemoryImage
internal import Synchronization
public import SystemPackage

/// How a snapshot is taken.
public struct SnapshotOptions: Sendable {
  /// What of the guest goes into the image.
  public enum Extent: String, Hashable, Sendable, CaseIterable {
    /// All of its memory.
    case full
    /// What was written since the last image, which becomes the parent.
    case incremental
  }

  /// All of memory, or what has changed.
  public var extent: Extent
  /// How the image holds pages.
  public var image: ImageOptions
  /// Strings to keep with the image; the guest's own win.
  public var metadata: [String: String] = [:]
  /// Threads that copy, 1 or more.
  public var threads = 2
  /// For live snapshots: bytes of memory for pages that the guest wants to write before they
  /// are in the image. When it is used up, the guest's writes wait for the disk.
  public var preimageBytes = 64 << 20
  /// For tests: what the thread does that lets a write happen, when it was told of it.
  package var beforeWrite: (@Sendable (_ pages: Range<Int>) -> Void)?
  /// Bytes of guest memory dealt with, and in all; called by several threads.
  public var progress: (@Sendable (_ done: Int, _ total: Int) -> Void)?

  /// Options for a snapshot.
  public init(_ extent: Extent = .full, image: ImageOptions = ImageOptions()) {
    self.extent = extent
    self.image = image
  }
}

/// Takes snapshots of one guest, one after the other.
///
/// With a tracker of the guest's writes, snapshots after the first can be incremental:
///
///     let snapshotter = Snapshotter(guest, tracking: tracking)
///     try snapshotter.takeLive(to: "monday.img")
///     try snapshotter.takeLive(to: "tuesday.img", SnapshotOptions(.incremental))
///
/// A snapshot that fails leaves the guest running, no half image, and what was written since
/// the last good image is still known. Pages that the guest gives back without writing
/// (balloon, madvise(2)) are not seen by trackers: see `noteChanged`.
public final class Snapshotter: Sendable {
  struct State {
    /// Written since the last image, as far as it was collected.
    var changed: DirtyBitmap
    /// The last image, from which `changed` counts; its path may have another one by now.
    var last: (path: FilePath, id: ImageID)?
    var isTracking = false
  }

  let guest: any SnapshotGuest
  let layout: SnapshotLayout
  let tracking: (any DirtyTracking)?
  /// `nil` while a snapshot is being taken.
  private let state: Mutex<State?>
  /// What `noteChanged` said since the last collection.
  private let noted: Mutex<DirtyBitmap>

  /// Takes snapshots of a guest.
  ///
  /// - Parameters:
  ///   - guest: whose memory stays mapped.
  ///   - tracking: a tracker of all of its regions, in their order, not started; `nil` when
  ///     there are no incremental snapshots. For live ones one of KVM's: those of userfaultfd
  ///     and the live snapshot cannot watch the same memory.
  public init(_ guest: any SnapshotGuest, tracking: (any DirtyTracking)? = nil) {
    self.guest = guest
    self.tracking = tracking
    layout = SnapshotLayout(guest.snapshotRegions)
    let none = DirtyBitmap(pageCount: layout.pageCount)
    state = Mutex(State(changed: none))
    noted = Mutex(none)
  }

  deinit { tracking?.stop() }

  /// How writes between snapshots are found; `nil` when they are not.
  public var trackingMethod: DirtyTrackingMethod? { tracking?.method }

  /// Goes on from an image: the guest's memory is what the image says, but for what was
  /// written since this call. The guest is paused, or has not run yet.
  public func begin(from image: FilePath) throws(SnapshotError) {
    try exclusively { state throws(SnapshotError) in
      try startTracking(&state)
      state.last = (image, try Self.open(image).id)
    }
  }

  /// Notes pages whose content changed without a write that a tracker sees, such as those
  /// that a balloon gave back. Pages of 4 KiB, numbered through all regions.
  ///
  /// At any time; a snapshot takes what was noted before its pause.
  public func noteChanged(_ pages: Range<Int>) {
    noted.withLock { $0.insert(pages) }
  }

  // MARK: - Snapshots

  /// Pauses the guest, copies its memory, and lets it go on.
  ///
  /// - Parameter leavesPaused: keeps it paused when the snapshot was taken; after a failure
  ///   it runs all the same.
  /// - Throws: `.image` when the image cannot be written, `.tracking`, and what the guest
  ///   throws. Then the path is as it was.
  public func take(
    to path: FilePath, _ options: SnapshotOptions = SnapshotOptions(), leavesPaused: Bool = false
  ) throws(SnapshotError) -> SnapshotReport {
    try exclusively { state throws(SnapshotError) in
      let run = SnapshotRun(self, path, options)
      return try run.takePaused(&state, leavesPaused: leavesPaused)
    }
  }

  /// Copies the guest's memory as it is at one point in time, while the guest goes on.
  ///
  /// The guest is paused for as long as it takes to save the states of its vCPUs and to
  /// protect what it wrote in the last moments before. From then on its first write to each
  /// page waits until that page is copied (50 µs), and no longer than that while there is room
  /// in `preimageBytes`.
  ///
  /// Memory must not be given back meanwhile (balloon, madvise(2) with MADV_DONTNEED or
  /// MADV_REMOVE): that changes pages without a write.
  ///
  /// - Throws: `.tracking` for memory that cannot be write-protected: guest_memfd, 1 GiB
  ///   pages, memory that a pager or another tracker watches by userfaultfd; else as `take`.
  public func takeLive(
    to path: FilePath, _ options: SnapshotOptions = SnapshotOptions()
  ) throws(SnapshotError) -> SnapshotReport {
    try exclusively { state throws(SnapshotError) in
      try SnapshotRun(self, path, options).takeLive(&state)
    }
  }

  private func exclusively<Value>(
    _ body: (inout State) throws(SnapshotError) -> Value
  ) throws(SnapshotError) -> Value {
    guard var current = state.withLock({ $0.take() }) else {
      throw SnapshotError(.guest, "A snapshot of this guest is being taken; wait for its end")
    }
    defer { state.withLock { $0 = current } }
    return try body(&current)
  }

  // MARK: - Tracking

  /// Watches all pages, if that was not done before. The guest may be running.
  func startTracking(_ state: inout State) throws(SnapshotError) {
    guard let tracking, !state.isTracking else { return }
    guard tracking.pageCount == layout.pageCount else {
      throw SnapshotError(
        .tracking,
        "The tracker watches \(tracking.pageCount) pages; the guest has \(layout.pageCount)")
    }
    do throws(DirtyTrackingError) {
      try tracking.start()
    } catch {
      throw SnapshotError(.tracking, error.description)
    }
    state.isTracking = true
  }

  /// The image that an incremental snapshot builds on.
  func base(_ state: State) throws(SnapshotError) -> MemoryImage {
    guard tracking != nil else {
      throw SnapshotError(
        .tracking, "An incremental snapshot needs a tracker of the guest's writes")
    }
    guard let last = state.last else {
      throw SnapshotError(
        .tracking, "There is no earlier image of this guest to build on; take a full one first")
    }
    let image = try Self.open(last.path)
    guard image.id == last.id else {
      throw SnapshotError(
        .image,
        "\(last.path) has another image now than the guest's last one, \(last.id); take a full one")
    }
    return image
  }

  private static func open(_ path: FilePath) throws(SnapshotError) -> MemoryImage {
    do throws(ImageError) {
      return try MemoryImage(path: path)
    } catch {
      throw SnapshotError(.image, error.description)
    }
  }

  /// Adds what was written since the last call.
  func collect(_ state: inout State) throws(SnapshotError) {
    guard let tracking, state.isTracking else { return }
    noted.withLock { noted in
      state.changed.formUnion(noted)
      noted.removeAll()
    }
    do throws(DirtyTrackingError) {
      try tracking.collect(into: &state.changed)
    } catch {
      throw SnapshotError(.tracking, error.description)
    }
  }
}
