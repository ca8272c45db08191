// SPDX-License-Identifier: Apache-2.0

internal import CLinux
public import SystemPackage

/// The one owner of a file descriptor; it is closed when the owner goes away.
public struct OwnedDescriptor: ~Copyable, Sendable {
  /// The number, valid as long as this owner lives.
  public let rawValue: CInt

  /// Takes ownership of an open descriptor.
  public init(owning rawValue: CInt) { self.rawValue = rawValue }

  deinit { _ = clinux_close(rawValue) }

  /// Closes and reports what the kernel said (close(2)). The descriptor is gone
  /// also when this throws.
  public consuming func close() throws(Errno) {
    let number = release()
    _ = try check(clinux_close(number))
  }

  /// Gives the number up without closing it.
  public consuming func release() -> CInt {
    let number = rawValue
    discard self
    return number
  }

  /// A second descriptor of the same open file, close-on-exec.
  public borrowing func duplicate() throws(Errno) -> OwnedDescriptor {
    OwnedDescriptor(owning: CInt(try check(clinux_dup(rawValue))))
  }

  /// Adds or removes O_NONBLOCK (fcntl(2), F_SETFL). It belongs to the open file,
  /// so every duplicate sees it.
  public borrowing func setNonBlocking(_ enabled: Bool) throws(Errno) {
    let flags = CInt(try check(clinux_status_flags(rawValue)))
    let wanted = enabled ? flags | O_NONBLOCK : flags & ~O_NONBLOCK
    _ = try check(clinux_set_status_flags(rawValue, wanted))
  }
}
