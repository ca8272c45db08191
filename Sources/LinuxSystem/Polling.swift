// SPDX-License-Identifier: Apache-2.0

internal import CLinux
public import SystemPackage

/// What poll(2) said of the first of two descriptors.
public enum Readiness: Sendable {
  /// The descriptor can be read.
  case readable
  /// The second descriptor, the stop sign, was signalled.
  case stopped
  /// The time ran out.
  case timedOut
  /// POLLERR or POLLHUP on the descriptor.
  case failed
}

/// Waits until a descriptor can be read or a stop sign is up. Allocates nothing.
///
/// - Parameter milliseconds: how long at most; negative waits for ever.
@safe
public func waitUntilReadable(
  _ descriptor: CInt, orStoppedBy stop: borrowing EventDescriptor, milliseconds: CInt = -1
) throws(Errno) -> Readiness {
  var set = (
    pollfd(fd: descriptor, events: Int16(POLLIN), revents: 0),
    pollfd(fd: stop.descriptor.rawValue, events: Int16(POLLIN), revents: 0)
  )
  let ready = unsafe withUnsafeMutableBytes(of: &set) { bytes in
    // SAFETY: a homogeneous tuple of two pollfd is laid out as an array of two.
    unsafe clinux_poll(bytes.assumingMemoryBound(to: pollfd.self).baseAddress, 2, milliseconds)
  }
  if ready == -Int(EINTR) { return .timedOut }
  guard try check(ready) > 0 else { return .timedOut }
  if set.1.revents != 0 { return .stopped }
  if set.0.revents & Int16(POLLIN) != 0 { return .readable }
  return .failed
}
