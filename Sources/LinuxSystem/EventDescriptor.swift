// SPDX-License-Identifier: Apache-2.0

internal import CLinux
public import SystemPackage

/// An eventfd that, once signalled, stays readable: a stop sign that every waiter
/// sees.
public struct EventDescriptor: ~Copyable, Sendable {
  /// The eventfd.
  public let descriptor: OwnedDescriptor

  /// A new one, not signalled.
  public init() throws(Errno) {
    let made = clinux_eventfd(0, CInt(EFD_CLOEXEC) | CInt(EFD_NONBLOCK))
    descriptor = OwnedDescriptor(owning: CInt(try check(made)))
  }

  /// Makes it readable.
  public borrowing func signal() {
    var one: UInt64 = 1
    // Fails only when the counter would overflow, and then it is readable anyway.
    _ = unsafe clinux_write(descriptor.rawValue, &one, 8)
  }

  /// Makes it unreadable again.
  public borrowing func reset() {
    var count: UInt64 = 0
    _ = unsafe clinux_read(descriptor.rawValue, &count, 8)
  }
}
