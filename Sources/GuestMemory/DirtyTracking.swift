// SPDX-License-Identifier: Apache-2.0

public import LinuxSystem
public import SystemPackage

/// Finds out which pages of a guest were written.
///
///     start()              everything is watched from here on
///     collect(into:)       what was written since, watched again
///     collect(into:)
///     stop()               nothing is watched, nothing is left behind
///
/// Content that is read *after* `collect` returned is at least as new as the writes that it
/// reported; a write that comes later is in the next `collect`. So copying the reported
/// pages after each `collect`, the last one with the guest paused, loses nothing.
///
/// Pages are numbered in units of 4 KiB, from the first page of the first region through
/// the last page of X from a thread that resolves faults of that memory.
public protocol DirtyTracking: AnyObject, Sendable {
  /// The implementation.
  var method: DirtyTrackingMethod { get }

  /// 4 KiB pages that are tracked: the size of the bitmap that `collect` wants.
  var pageCount: Int { get }

  /// Makes everything ready for `arm` without watching any page. Short, whatever the size
  /// of the memory, so it can be done while the guest is paused or before it exists.
  func prepare() throws(DirtyTrackingError)

  /// Watches pages from here on; those that are watched already stay as they are.
  ///
  /// For arming ahead of a pause in pieces and with several threads. Ranges are rounded
  /// outwards to pages of the memory. After `prepare`.
  func arm(_ pages: Range<Int>) throws(DirtyTrackingError)

  /// Adds the armed pages that were written since the last call, or since they were armed,
  /// to `bitmap`, and watches them again.
  ///
  /// After an error the bitmap has all that was taken so far, and the rest comes with the
  /// next call.
  func collect(into bitmap: inout DirtyBitmap) throws(DirtyTrackingError)

  /// Stops watching; what was not collected is forgotten. The guest runs on, unprotected,
  /// and no thread or descriptor of the tracking is left. Also when nothing was started.
  ///
  /// Dropping the last reference does the same.
  func stop()
}

extension DirtyTracking {
  /// Watches all pages: `prepare`, then `arm`. Stops again when that fails.
  public func start() throws(DirtyTrackingError) {
    try prepare()
    do throws(DirtyTrackingError) {
      try arm(0..<pageCount)
    } catch {
      stop()
      throw error
    }
  }

  /// The pages that were written since the last call, in a new bitmap.
  public func collect() throws(DirtyTrackingError) -> DirtyBitmap {
    var bitmap = DirtyBitmap(pageCount: pageCount)
    try collect(into: &bitmap)
    return bitmap
  }
}

/// How writes are noticed.
public enum DirtyTrackingMethod: String, Hashable, Sendable, CaseIterable {
  /// KVM's dirty rings: writes of vCPUs; costs follow the number of writes.
  case ring
  /// KVM's dirty log with manual protection: writes of vCPUs.
  case log
  /// userfaultfd write protection: a thread of ours lets each write happen, and can do
  /// something first. Writes through the watched mapping, whoever makes them.
  case writeProtect = "write-protect"
  /// userfaultfd WP_ASYNC and PAGEMAP_SCAN (Linux 6.7): the kernel takes notes. Writes
  /// through the watched mapping, whoever makes them.
  case async
}

/// A part of guest memory that is to be tracked.
public struct TrackedRegion: Hashable, Sendable {
  /// Where this process maps it; whole pages of the backing.
  public var host: HostRange
  /// What it is made of.
  public var backing: MemoryBacking

  /// A part of guest memory. It stays mapped until tracking has stopped.
  public init(host: HostRange, backing: MemoryBacking) {
    self.host = host
    self.backing = backing
  }

  /// All of a memory object.
  public init(_ memory: borrowing GuestMemoryObject) {
    self.init(host: memory.range, backing: memory.backing)
  }
}

/// Why writes cannot be tracked.
public struct DirtyTrackingError: Error, Sendable, CustomStringConvertible {
  /// The kind of failure. A struct, so that kinds can be added.
  public struct Code: Hashable, Sendable {
    private enum Kind { case unavailable, invalidArgument, wrongState, failed }
    private let kind: Kind
    private init(_ kind: Kind) { self.kind = kind }

    /// This machine, or this memory, does not have that method.
    public static let unavailable = Self(.unavailable)
    /// Pages or a bitmap that do not fit the memory.
    public static let invalidArgument = Self(.invalidArgument)
    /// Not prepared, or prepared already.
    public static let wrongState = Self(.wrongState)
    /// The kernel refused; see `errno`.
    public static let failed = Self(.failed)
  }

  /// The kind of failure.
  public let code: Code
  /// What the kernel said, if it was asked.
  public let errno: Errno?
  /// What failed, why, and what to do about it.
  public let description: String

  /// An error of an implementation.
  public init(_ code: Code, _ description: String, errno: Errno? = nil) {
    self.code = code
    self.errno = errno
    self.description = description
  }

  /// A call that was refused.
  public init(_ attempt: String, _ errno: Errno) {
    self.init(.failed, "\(attempt) failed: \(errno)", errno: errno)
  }

  /// Every method's answer when it is not prepared.
  public static let notStarted = Self(
    .wrongState, "Writes are not being tracked: call prepare() or start() first")
  /// Every method's answer when it is prepared twice.
  public static let alreadyStarted = Self(
    .wrongState, "Writes are being tracked already: call stop() first")
}

extension DirtyBitmap {
  /// Throws unless it has a bit for each of `pageCount` pages.
  public func requirePageCount(_ pageCount: Int) throws(DirtyTrackingError) {
    guard self.pageCount == pageCount else {
      throw DirtyTrackingError(
        .invalidArgument, "The bitmap has \(self.pageCount) pages, the memory \(pageCount)")
    }
  }
}
