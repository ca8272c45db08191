// SPDX-License-Identifier: Apache-2.0

internal import GuestMemory
internal import LinuxSystem
internal import MemoryImage
internal import SystemPackage

/// One snapshot that is being taken.
///
///     paused:                            live:
///     pause                              write-protect memory, while the guest runs
///     save states, collect writes        pause
///     copy                               save states, collect writes, protect those again
///     resume                             resume
///     make the image durable             copy; first what the guest wants to write
///                                        make the image durable
struct SnapshotRun {
  private let guest: any SnapshotGuest
  private let layout: SnapshotLayout
  private let owner: Snapshotter
  private let options: SnapshotOptions
  private let path: FilePath
  private let start = MonotonicClock.nanoseconds

  init(_ owner: Snapshotter, _ path: FilePath, _ options: SnapshotOptions) {
    guest = owner.guest
    layout = owner.layout
    self.owner = owner
    self.options = options
    self.path = path
  }

  // MARK: - Paused

  func takePaused(
    _ state: inout Snapshotter.State, leavesPaused: Bool
  ) throws(SnapshotError) -> SnapshotReport {
    var report = SnapshotReport()
    var writer = try makeWriter(state)
    try owner.startTracking(&state)
    var watch = StopWatch()
    try guest.pause()
    report.pause.stopping = watch.lap()
    do throws(SnapshotError) {
      let saved = try saveStates()
      report.pause.savingState = watch.lap()
      try owner.collect(&state)
      report.pause.tracking = watch.lap()
      let pages = options.extent == .full ? try layout.populated(of: guest) : state.changed
      report.pages = pages.count
      try copier(writer.blocks).copy(pages)
      report.pause.copying = watch.lap()
      if !leavesPaused {
        guest.resume()
        report.pause.resuming = watch.lap()
      }
      try add(saved, to: &writer)
    } catch {
      guest.resume()
      throw error
    }
    do throws(SnapshotError) {
      end(&state, &report, try finish(writer))
    } catch {
      if leavesPaused { guest.resume() }
      throw error
    }
    return report
  }

  // MARK: - Live

  func takeLive(_ state: inout Snapshotter.State) throws(SnapshotError) -> SnapshotReport {
    var report = SnapshotReport()
    var writer = try makeWriter(state)
    try owner.startTracking(&state)
    let preimages = try makePreimages()
    do throws(SnapshotError) {
      var watch = StopWatch()
      var protection = LiveProtection(layout, try makeProtection(preimages))
      if options.extent == .full {
        try protection.protect(DirtyBitmap(all: layout.pageCount))
      } else {
        try owner.collect(&state)
        try protection.protect(state.changed)
      }
      try protection.settle()
      report.arming = watch.lap()
      let saved = try freeze(&state, &protection, preimages, &report)
      // Populated since the pause: then the pool has it, or it holds zeros.
      let pages =
        options.extent == .full
        ? layout.rounded(try layout.populated(of: guest)) : protection.pages
      report.pages = pages.count
      let copier = copier(writer.blocks, preimages)
      try copier.copy(pages)
      try preimages.end { () throws(SnapshotError) in try copier.writeFull(of: preimages.pool) }
      try copier.writeRest(of: preimages.pool)
      try add(saved, to: &writer)
      report.copiedFirst = preimages.pool.pageCount
      report.stalls = preimages.pool.stalls
    } catch {
      // The guest comes first: let its writes through, then give up the image.
      preimages.fail()
      preimages.stop()
      throw error
    }
    end(&state, &report, try finish(writer))
    return report
  }

  /// The pause of a live snapshot.
  private func freeze(
    _ state: inout Snapshotter.State, _ protection: inout LiveProtection,
    _ preimages: PreimageGuard, _ report: inout SnapshotReport
  ) throws(SnapshotError) -> SavedStates {
    var watch = StopWatch()
    try guest.pause()
    // From here on the guest goes on whatever happens.
    let saved: SavedStates
    do throws(SnapshotError) {
      report.pause.stopping = watch.lap()
      saved = try saveStates()
      report.pause.savingState = watch.lap()
      try owner.collect(&state)
      if options.extent == .incremental { try protection.protect(state.changed) }
      try preimages.begin()
      try protection.protectAgain()
      report.pause.tracking = watch.lap()
    } catch {
      guest.resume()
      throw error
    }
    guest.resume()
    report.pause.resuming = watch.lap()
    return saved
  }

  private func makePreimages() throws(SnapshotError) -> PreimageGuard {
    do throws(Errno) {
      return try PreimageGuard(layout, poolBytes: options.preimageBytes)
    } catch {
      throw SnapshotError(
        .memory, "There is no memory for pages that the guest wants to write: \(error)")
    }
  }

  private func makeProtection(
    _ preimages: PreimageGuard
  ) throws(SnapshotError) -> WriteProtectTracking {
    for region in layout.regions where region.unit > PageBatch.capacity {
      throw SnapshotError(
        .tracking,
        "A live snapshot of \(region.region.backing) memory would hold up a write until 1 GiB "
          + "is copied; pause the guest")
    }
    do throws(DirtyTrackingError) {
      let beforeWrite = options.beforeWrite
      let tracking = try WriteProtectTracking(layout.trackedRegions) { pages in
        preimages.willWrite(pages)
        beforeWrite?(pages)
      }
      try tracking.prepare()
      preimages.use(tracking)
      return tracking
    } catch {
      throw SnapshotError(.tracking, error.description)
    }
  }

  // MARK: - The image

  private struct SavedStates {
    let devices: [DeviceState]
    let metadata: [String: String]
  }

  private func saveStates() throws(SnapshotError) -> SavedStates {
    SavedStates(devices: try guest.saveDeviceStates(), metadata: guest.snapshotMetadata())
  }

  private func copier(_ blocks: ImageBlockWriter, _ preimages: PreimageGuard? = nil) -> PageCopier {
    PageCopier(
      layout: layout, writer: blocks, threads: max(1, options.threads),
      progress: options.progress, preimages: preimages)
  }

  /// Before the guest stands still and is watched: it may fail, and takes its time.
  private func makeWriter(_ state: Snapshotter.State) throws(SnapshotError) -> ImageWriter {
    let parent = options.extent == .incremental ? try owner.base(state) : nil
    do throws(ImageError) {
      return try ImageWriter(
        path: path, regions: layout.imageRegions, options: options.image, parent: parent)
    } catch {
      throw SnapshotError(.image, error.description)
    }
  }

  private func add(
    _ saved: SavedStates, to writer: inout ImageWriter
  ) throws(SnapshotError) {
    do throws(ImageError) {
      for (key, value) in options.metadata.merging(saved.metadata, uniquingKeysWith: { $1 }) {
        try writer.setMetadata(key: key, value: value)
      }
      for state in saved.devices { try writer.add(state: state) }
    } catch {
      throw SnapshotError(.image, error.description)
    }
  }

  /// Returns the image's id.
  private func finish(_ writer: consuming ImageWriter) throws(SnapshotError) -> ImageID {
    let id = writer.id
    do throws(ImageError) {
      try writer.finish()
      return id
    } catch {
      throw SnapshotError(.image, error.description)
    }
  }

  /// The image is there: from here on changes count from it.
  private func end(
    _ state: inout Snapshotter.State, _ report: inout SnapshotReport, _ id: ImageID
  ) {
    state.changed.removeAll()
    state.last = (path, id)
    report.duration = MonotonicClock.nanoseconds - start
  }
}

/// Which pages of a guest are write-protected for a live snapshot.
struct LiveProtection {
  private let layout: SnapshotLayout
  private let tracking: WriteProtectTracking
  /// Whole pages of the backing.
  private(set) var pages: DirtyBitmap
  private var written: DirtyBitmap

  init(_ layout: SnapshotLayout, _ tracking: WriteProtectTracking) {
    self.layout = layout
    self.tracking = tracking
    pages = DirtyBitmap(pageCount: layout.pageCount)
    written = pages
  }

  /// Protects pages that are not protected yet.
  mutating func protect(_ wanted: DirtyBitmap) throws(SnapshotError) {
    var new = layout.rounded(wanted)
    new.subtract(pages)
    do throws(DirtyTrackingError) {
      for run in new.ranges { try tracking.arm(run) }
    } catch {
      throw SnapshotError(.tracking, error.description)
    }
    pages.formUnion(new)
  }

  /// Protects again what was written since it was protected.
  mutating func protectAgain() throws(SnapshotError) {
    written.removeAll()
    do throws(DirtyTrackingError) {
      try tracking.collect(into: &written)
    } catch {
      throw SnapshotError(.tracking, error.description)
    }
  }

  /// Does that until little is left to do in the pause, or it does not get less: each round
  /// is as long as the guest wrote during the one before.
  mutating func settle() throws(SnapshotError) {
    var last = Int.max
    for _ in 0..<8 {
      try protectAgain()
      let count = written.count
      if count < 32 || count >= last { return }
      last = count
    }
  }
}

/// Times one step after the other.
struct StopWatch {
  private var last = MonotonicClock.nanoseconds

  /// Nanoseconds since the last call, or the beginning.
  mutating func lap() -> UInt64 {
    let now = MonotonicClock.nanoseconds
    defer { last = now }
    return now - last
  }
}
