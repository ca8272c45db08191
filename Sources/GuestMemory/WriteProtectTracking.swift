// SPDX-License-Identifier: Apache-2.0

internal import LinuxSystem
internal import Synchronization
internal import SystemPackage
internal import Userfault

/// Tracks writes by userfaultfd write protection: the first write to an armed page waits
/// until a thread of ours has noted the page and lifted its protection (about 50 µs).
///
/// It sees all writes through the watched mapping (vCPUs, this process, system calls), and
/// none by way of the object behind it (pwrite(2), other mappings); pages that are given up
/// by madvise(2) are not seen either. Huge pages are written as a whole.
///
/// With a hook it is the base of a live snapshot, in which a page is copied before it
/// changes:
///
///     arm(pages) …             ahead, while the guest runs; in pieces, from several threads
///     pause the guest
///     the hook begins to copy
///     announceAnew()           also what it was told of and did not copy
///     collect(into:)           protects again what was written meanwhile
///     resume the guest
///     copy, then disarm(pages) …
///     check()                  no write went by
///     stop()
///
/// A waiting vCPU cannot be kicked on KVM_PVM; it goes on when the thread has served it.
public final class WriteProtectTracking: DirtyTracking {
  /// Called before a write to armed pages happens, on the tracker's thread: they still have
  /// the content that they had when they were armed, and keep it until this returns.
  ///
  /// The pages are one page of the backing: one for 4 KiB pages, 512 for 2 MiB pages. A page
  /// is announced once each time it is armed, and again after `announceAnew`. The hook may read the memory; it must not
  /// write it, allocate, wait for a vCPU, or call the tracker.
  public typealias WriteHook = @Sendable (_ pages: Range<Int>) -> Void

  private struct Running {
    let engine: WriteProtectEngine
    let thread: TrackerThread
  }

  private let layout: TrackedLayout
  private let hook: WriteHook?
  private let running = Mutex<Running?>(nil)

  /// A tracker of some regions; does nothing yet. Throws `.invalidArgument` for a region
  /// that is not made of whole pages, `.unavailable` for memory that it cannot track.
  public init(
    _ regions: [TrackedRegion], willWrite hook: WriteHook? = nil
  ) throws(DirtyTrackingError) {
    layout = try TrackedLayout(regions)
    self.hook = hook
    for region in regions {
      if let reason = UserfaultTracking.unavailability(.writeProtect, region.backing) {
        throw DirtyTrackingError(.unavailable, "Writes to \(region.backing): \(reason)")
      }
    }
  }

  deinit { stop() }

  /// The name of the thread that lets writes happen.
  public static let threadName = "dirty-wp"

  /// `.writeProtect`.
  public var method: DirtyTrackingMethod { .writeProtect }

  /// 4 KiB pages of all regions.
  public var pageCount: Int { layout.pageCount }

  /// Registers the regions with a userfaultfd of their own, and starts the thread.
  public func prepare() throws(DirtyTrackingError) {
    try running.withLock { running throws(DirtyTrackingError) in
      guard running == nil else { throw .alreadyStarted }
      let engine = try WriteProtectEngine(layout, hook)
      do throws(Errno) {
        // The thread owns nothing of this tracker, so that dropping it ends the thread.
        let thread = try NamedThread(name: Self.threadName) { engine.serve() }
        running = Running(engine: engine, thread: TrackerThread(thread))
      } catch {
        throw DirtyTrackingError("Starting the thread \(Self.threadName)", error)
      }
    }
  }

  private func engine() throws(DirtyTrackingError) -> WriteProtectEngine {
    guard let running = running.withLock({ $0 }) else { throw .notStarted }
    return running.engine
  }

  /// Write-protects pages, 4 MiB in each call (ioctl_userfaultfd(2), UFFDIO_WRITEPROTECT):
  /// 16 to 40 ms for each GiB of 4 KiB pages. Pages that were written since
  /// they were last armed stay noted.
  public func arm(_ pages: Range<Int>) throws(DirtyTrackingError) {
    let engine = try engine()
    try layout.require(pages)
    try engine.arm(pages)
  }

  /// Lets pages be written without a fault and without being noted from here on. What was
  /// noted stays so. Ranges are rounded outwards to pages of the memory.
  public func disarm(_ pages: Range<Int>) throws(DirtyTrackingError) {
    let engine = try engine()
    try layout.require(pages)
    try engine.disarm(pages)
  }

  /// Has the writes announced again that were announced before this call and have not happened
  /// when the next `collect` is at their page: the thread may stand still between the two. What
  /// happened before that, `collect` takes.
  public func announceAnew() throws(DirtyTrackingError) { try engine().announceAnew() }

  /// Throws when the thread could not read faults any more: then it has let all writes through
  /// that nobody was told of.
  public func check() throws(DirtyTrackingError) { try engine().check() }

  /// Takes what was noted and write-protects just those pages again: the cost follows their
  /// number.
  public func collect(into bitmap: inout DirtyBitmap) throws(DirtyTrackingError) {
    let engine = try engine()
    try bitmap.requirePageCount(pageCount)
    try engine.collect(into: &bitmap)
  }

  /// Lifts the protection, unregisters the regions, and ends the thread. Not from the hook.
  public func stop() {
    guard let ended = running.withLock({ $0.take() }) else { return }
    // The thread serves until nothing is protected any more.
    ended.engine.release()
    ended.thread.join()
  }
}

/// A thread behind a shared reference.
private final class TrackerThread: Sendable {
  private let thread: Mutex<NamedThread?>
  init(_ thread: consuming NamedThread) { self.thread = Mutex(thread) }
  func join() {
    let thread = thread.withLock { $0.take() }
    if let thread { thread.join() }
  }
}
