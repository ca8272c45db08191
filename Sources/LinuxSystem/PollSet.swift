// SPDX-License-Identifier: Apache-2.0

internal import CLinux
public import SystemPackage

/// Up to three descriptors that one thread waits for with poll(2).
///
/// Waking up from poll(2) takes a few microseconds less than from epoll_wait(2); for a
/// thread that watches two or three descriptors by itself that is the better trade.
/// Waiting allocates nothing.
public struct PollSet: Sendable {
  private let first: CInt
  private let second: CInt
  private let third: CInt

  /// Which descriptor, by its place (0, 1, 2), and whether it can be read or has only
  /// failed (POLLERR, POLLHUP).
  public typealias Ready = Poller.Event

  /// A set; the descriptors stay the caller's. -1 stands for none.
  public init(_ first: CInt, _ second: CInt, _ third: CInt = -1) {
    (self.first, self.second, self.third) = (first, second, third)
  }

  /// Waits until one can be read or has failed; the last one in the list that has goes
  /// first. `nil` when the time ran out or a signal came.
  ///
  /// - Parameter milliseconds: negative waits for ever.
  public func wait(milliseconds: CInt = -1) throws(Errno) -> Ready? {
    let wanted = Int16(POLLIN)
    var set = (
      pollfd(fd: first, events: wanted, revents: 0),
      pollfd(fd: second, events: wanted, revents: 0),
      pollfd(fd: third, events: wanted, revents: 0)
    )
    let result = unsafe withUnsafeMutableBytes(of: &set) { bytes in
      // SAFETY: a homogeneous tuple of three pollfd is laid out as an array of three.
      unsafe clinux_poll(bytes.assumingMemoryBound(to: pollfd.self).baseAddress, 3, milliseconds)
    }
    if result == -Int(EINTR) { return nil }
    _ = try check(result)
    if set.2.revents != 0 { return Ready(tag: 2, isReadable: set.2.revents & wanted != 0) }
    if set.1.revents != 0 { return Ready(tag: 1, isReadable: set.1.revents & wanted != 0) }
    if set.0.revents != 0 { return Ready(tag: 0, isReadable: set.0.revents & wanted != 0) }
    return nil
  }
}
