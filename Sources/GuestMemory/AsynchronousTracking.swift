// SPDX-License-Identifier: Apache-2.0

internal import LinuxSystem
internal import Synchronization
internal import SystemPackage
internal import Userfault

/// Tracks writes by userfaultfd's WP_ASYNC and PAGEMAP_SCAN (Linux 6.7): the kernel lifts a
/// page's protection by itself when it is written, and tells afterwards where it did.
///
/// It sees all writes through the watched mapping (vCPUs, this process, system calls), and
/// none by way of the object behind it (pwrite(2), other mappings). Pages of anonymous
/// memory that were given up (MADV_DONTNEED) count as written. Huge pages are written as a
/// whole.
public final class AsynchronousTracking: DirtyTracking {
  /// What `arm` and `collect` work with while a `stop` waits for them.
  private final class Engine: Sendable {
    let userfaultfd: Userfaultfd
    let pageMap: PageMap
    let armed: Mutex<DirtyBitmap>

    init(_ layout: TrackedLayout) throws(DirtyTrackingError) {
      do throws(Errno) {
        pageMap = try PageMap()
      } catch {
        throw DirtyTrackingError("Opening /proc/self/pagemap", error)
      }
      armed = Mutex(DirtyBitmap(pageCount: layout.pageCount))
      userfaultfd = try UserfaultTracking.makeUserfaultfd(.async, layout)
    }
  }

  private let layout: TrackedLayout
  private let engine = Mutex<Engine?>(nil)

  /// A tracker of some regions; does nothing yet. Throws `.invalidArgument` for a region
  /// that is not made of whole pages, `.unavailable` for memory that it cannot track.
  public init(_ regions: [TrackedRegion]) throws(DirtyTrackingError) {
    layout = try TrackedLayout(regions)
    for region in regions {
      if let reason = UserfaultTracking.unavailability(.async, region.backing) {
        throw DirtyTrackingError(.unavailable, "Writes to \(region.backing): \(reason)")
      }
    }
  }

  deinit { stop() }

  /// `.async`.
  public var method: DirtyTrackingMethod { .async }

  /// 4 KiB pages of all regions.
  public var pageCount: Int { layout.pageCount }

  /// Registers the regions with a userfaultfd of their own.
  public func prepare() throws(DirtyTrackingError) {
    try engine.withLock { engine throws(DirtyTrackingError) in
      guard engine == nil else { throw .alreadyStarted }
      engine = try Engine(layout)
    }
  }

  private func running() throws(DirtyTrackingError) -> Engine {
    guard let engine = engine.withLock({ $0 }) else { throw .notStarted }
    return engine
  }

  /// Write-protects pages, 4 MiB in each call (ioctl_userfaultfd(2), UFFDIO_WRITEPROTECT):
  /// 16 to 40 ms for each GiB of 4 KiB pages.
  public func arm(_ pages: Range<Int>) throws(DirtyTrackingError) {
    let engine = try running()
    try layout.require(pages)
    try layout.forEachPiece(of: pages, piecePages: UserfaultTracking.piecePages) {
      piece throws(DirtyTrackingError) in
      // A page that is armed already may have been written: protecting it would forget that.
      let fresh = engine.armed.withLock { armed in
        var fresh: [Range<Int>] = []
        var next = piece.pages.lowerBound
        for run in armed.ranges(in: piece.pages) {
          if next < run.lowerBound { fresh.append(next..<run.lowerBound) }
          next = run.upperBound
        }
        if next < piece.pages.upperBound { fresh.append(next..<piece.pages.upperBound) }
        return fresh
      }
      for run in fresh {
        let host = HostRange(
          start: piece.host.start.advanced(by: (run.lowerBound - piece.pages.lowerBound) * 4096),
          length: run.count * 4096)
        do throws(Errno) {
          try engine.userfaultfd.writeProtect(host, enabled: true)
        } catch {
          throw DirtyTrackingError("Write-protecting \(host)", error)
        }
        engine.armed.withLock { $0.insert(run) }
      }
    }
  }

  /// Finds the written pages and protects them again, in one walk over the page tables of
  /// what is armed (PAGEMAP_SCAN).
  public func collect(into bitmap: inout DirtyBitmap) throws(DirtyTrackingError) {
    let engine = try running()
    try bitmap.requirePageCount(pageCount)
    let armed = engine.armed.withLock { $0 }
    for region in layout.regions {
      for run in armed.ranges(in: region.pages) {
        do throws(Errno) {
          try engine.pageMap.takeWritten(in: region.range(of: run)) { written in
            let first = region.firstPage + region.host.start.distance(to: written.start) / 4096
            bitmap.insert(first..<first + written.length / 4096)
          }
        } catch {
          throw DirtyTrackingError("Scanning \(region.range(of: run)) for written pages", error)
        }
      }
    }
  }

  /// Lifts the protection, unregisters the regions and closes the userfaultfd.
  public func stop() {
    let ended = engine.withLock { $0.take() }
    if let ended { UserfaultTracking.release(ended.userfaultfd, layout) }
  }
}
