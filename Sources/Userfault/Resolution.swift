// SPDX-License-Identifier: Apache-2.0

public import SystemPackage

/// How far an ioctl that fills, maps or moves pages came, and what stopped it.
///
/// Partial progress is a value: the first `bytesDone` bytes are resolved and their
/// waiters are awake, whatever stopped the rest.
public struct Resolution: Hashable, Sendable {
  /// What the kernel's odd outcomes mean to a page-fault handler.
  public enum Obstacle: Hashable, Sendable {
    /// EEXIST: a page is already there. Its waiters are *not* woken.
    case alreadyPresent
    /// EAGAIN: a fork, remap, remove or unmap is under way. Read its event first.
    case mappingChanging
    /// EAGAIN after some progress: do the rest again to learn why.
    case partial
    /// ENOENT: the range is not registered here (any more).
    case notRegistered
    /// ESRCH: the process, or its address space, is gone.
    case processGone
    /// EFAULT: the source is unreadable, or (CONTINUE) no page is in the page cache.
    case absent
    /// Anything else.
    case failed(Errno)
  }

  /// Bytes from the start of the range that are resolved.
  public var bytesDone: Int
  /// `nil` when all of it is done.
  public var obstacle: Obstacle?

  /// A result; `bytesDone` counts from the start of the range.
  @inlinable public init(bytesDone: Int, obstacle: Obstacle? = nil) {
    self.bytesDone = bytesDone
    self.obstacle = obstacle
  }

  /// Decodes what an ioctl returned and what it left in its signed progress field
  /// (mm/userfaultfd.c: the field is bytes, or the negated errno of the first page,
  /// or untouched when the arguments were refused).
  @inlinable init(result: Int, progress: Int64, length: Int) {
    if result >= 0 {
      self.init(bytesDone: length)
    } else if progress > 0 {
      self.init(bytesDone: Int(progress), obstacle: .partial)
    } else {
      self.init(bytesDone: 0, obstacle: Obstacle(Errno(rawValue: CInt(-result))))
    }
  }
}

extension Resolution.Obstacle {
  @usableFromInline init(_ errno: Errno) {
    self =
      switch errno {
      case .fileExists: .alreadyPresent
      case .resourceTemporarilyUnavailable: .mappingChanging
      case .noSuchFileOrDirectory: .notRegistered
      case .noSuchProcess: .processGone
      case .badAddress: .absent
      default: .failed(errno)
      }
  }
}
