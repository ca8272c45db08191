// SPDX-License-Identifier: Apache-2.0

public import LinuxSystem
public import SystemPackage

/// Why a pager could not do what it was asked.
public struct PagerError: Error, Sendable, CustomStringConvertible {
  /// The kind of failure. A struct, so that kinds can be added.
  public struct Code: Hashable, Sendable {
    private enum Kind { case invalidRegion, registration, resources, damagedPages, ended, stopped }
    private let kind: Kind
    private init(_ kind: Kind) { self.kind = kind }

    /// A region is misaligned, empty, or overlaps another.
    public static let invalidRegion = Self(.invalidRegion)
    /// The kernel refused to watch a region.
    public static let registration = Self(.registration)
    /// No memory, thread or descriptor for the session.
    public static let resources = Self(.resources)
    /// Pages have no right content; they were poisoned where the kernel can.
    public static let damagedPages = Self(.damagedPages)
    /// The session has ended, or its guest is gone.
    public static let ended = Self(.ended)
    /// It was stopped before all pages were there.
    public static let stopped = Self(.stopped)
  }

  /// The kind of failure.
  public let code: Code
  /// What failed, why, and what to do about it.
  public let description: String
  /// What the kernel said, if it was asked.
  public let errno: Errno?

  init(_ code: Code, _ description: String, errno: Errno? = nil) {
    self.code = code
    self.errno = errno
    self.description = errno.map { "\(description): \($0)" } ?? description
  }
}

/// A page for which no right content could be had.
public struct PageFailure: Sendable, CustomStringConvertible {
  /// Where the guest has it.
  public let guestAddress: GuestAddress
  /// Where it lies in the process that is served, or lay before it was moved.
  public let hostAddress: HostAddress
  /// Bytes.
  public let pageSize: PageSize
  /// Whether the page raises SIGBUS or a memory fault now. If not, its waiters wait:
  /// the kernel has no UFFDIO_POISON (Linux 6.6).
  public let isPoisoned: Bool
  /// What went wrong.
  public let reason: String

  /// One line that names the page, the reason and what was done.
  public var description: String {
    "guest page \(guestAddress) (\(pageSize)): \(reason); "
      + (isPoisoned ? "poisoned, a touch is a memory fault" : "not resolved, a touch waits")
  }
}
