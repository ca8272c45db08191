// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import Glibc
public import SystemPackage

/// Who is at the other end of a Unix socket, as the kernel saw it when the connection was
/// made (SO_PEERCRED, unix(7)). The other side cannot forge it.
public struct PeerCredentials: Sendable, Hashable, CustomStringConvertible {
  /// The process that connected, in our PID namespace; 0 when it is not visible there.
  public let processID: CInt
  /// Its effective user.
  public let userID: UInt32
  /// Its effective group.
  public let groupID: UInt32

  /// Credentials with these numbers.
  public init(processID: CInt, userID: UInt32, groupID: UInt32) {
    self.processID = processID
    self.userID = userID
    self.groupID = groupID
  }

  /// "process 812 (uid 0, gid 0)".
  public var description: String { "process \(processID) (uid \(userID), gid \(groupID))" }
}

extension UnixSocket {
  /// Who connected.
  public var peer: PeerCredentials {
    get throws(Errno) {
      var (process, user, group): (CInt, UInt32, UInt32) = (0, 0, 0)
      _ = try unsafe check(
        clinux_peer_credentials(descriptor.rawValue, &process, &user, &group))
      return PeerCredentials(processID: process, userID: user, groupID: group)
    }
  }

  /// A pidfd of the process that connected.
  ///
  /// With SO_PEERPIDFD (Linux 6.5) it is that process for certain. An older kernel is asked
  /// for the process that has its number now (pidfd_open(2)), which is another one when the
  /// peer has died and its number was given out again. `noSuchProcess` when it is gone.
  public func openPeerProcess() throws(Errno) -> OwnedDescriptor {
    let opened = clinux_peer_pidfd(descriptor.rawValue)
    if opened >= 0 { return OwnedDescriptor(owning: CInt(opened)) }
    let errno = Errno(rawValue: CInt(-opened))
    guard errno == .protocolNotAvailable else { throw errno }
    let processID = try peer.processID
    guard processID > 0 else { throw .noSuchProcess }
    return try openProcess(processID)
  }

  /// Whether something can be received, or the peer has closed.
  public var isReadable: Bool {
    get throws(Errno) { try PollSet(descriptor.rawValue, -1).wait(milliseconds: 0) != nil }
  }

  /// Whether the peer has closed, or sends no more (POLLRDHUP, poll(2)), whatever can be received
  /// yet.
  public var isHungUp: Bool {
    var set = pollfd(fd: descriptor.rawValue, events: clinux_poll_hangup(), revents: 0)
    return unsafe clinux_poll(&set, 1, 0) > 0
  }

  /// Ends the connection for both sides (SHUT_RDWR, shutdown(2)), without closing it.
  public func hangUp() { _ = shutdown(descriptor.rawValue, CInt(SHUT_RDWR)) }

  /// Waits until something can be received, or the peer has closed.
  ///
  /// - Parameters:
  ///   - deadline: on `MonotonicClock.nanoseconds`; `timedOut` when it passes.
  ///   - stopSign: a descriptor that ends the wait with `canceled` when it can be read; -1
  ///     for none.
  public func waitUntilReadable(before deadline: UInt64, stopSign: CInt = -1) throws(Errno) {
    let set = PollSet(descriptor.rawValue, stopSign)
    while true {
      let now = MonotonicClock.nanoseconds
      guard now < deadline else { throw .timedOut }
      // Rounded up, so that it does not spin through the last millisecond.
      let milliseconds = min((deadline - now + 999_999) / 1_000_000, UInt64(CInt.max))
      guard let ready = try set.wait(milliseconds: CInt(milliseconds)) else { continue }
      if ready.tag == 1 { throw .canceled }
      return
    }
  }

  /// Waits for the next bytes, at most `limit`, and adds what descriptors come with them to
  /// a list that may not hold more than `descriptorLimit`; no bytes means that the peer has
  /// closed.
  ///
  /// `messageTooLong`: more descriptors than that, or more than this process may have open;
  /// those of this call are closed. `timedOut` and `canceled` as in `waitUntilReadable`.
  public func receive(
    limit: Int, into descriptors: inout DescriptorList, descriptorLimit: Int,
    before deadline: UInt64, stopSign: CInt = -1
  ) throws(Errno) -> [UInt8] {
    try waitUntilReadable(before: deadline, stopSign: stopSign)
    let room = max(0, descriptorLimit - descriptors.count)
    let message = try receive(limit: limit, descriptorLimit: room)
    descriptors.append(owning: message.descriptors)
    return message.bytes
  }

  /// Receives what is there without waiting, at most `limit` bytes; `nil` when there is nothing, no
  /// bytes when the peer has closed. All descriptors that come with it are added to the list, up to 253
  /// (SCM_MAX_FD): closing one can wait for what is behind it.
  ///
  /// `messageTooLong`: more than this process may have open; those that fit are in the list.
  public func receiveWithoutWaiting(
    limit: Int, into descriptors: inout DescriptorList
  ) throws(Errno) -> [UInt8]? {
    var bytes = [UInt8](repeating: 0, count: limit)
    var numbers = [CInt](repeating: -1, count: 253)
    var count = 0
    let socket = descriptor.rawValue
    var received = 0
    repeat {
      count = numbers.count
      received = unsafe bytes.withUnsafeMutableBytes { buffer in
        unsafe numbers.withUnsafeMutableBufferPointer { room in
          unsafe clinux_receive_all_nowait(
            socket, buffer.baseAddress, buffer.count, room.baseAddress, &count)
        }
      }
      descriptors.append(owning: Array(numbers.prefix(count)))
    } while received == -Int(EINTR)
    if received == -Int(EAGAIN) { return nil }
    return Array(bytes.prefix(try check(received)))
  }

  /// Sends as many of the bytes as the socket takes without waiting; 0 when it is full.
  public func sendWithoutWaiting(_ bytes: [UInt8]) throws(Errno) -> Int {
    let socket = descriptor.rawValue
    let result = unsafe bytes.withUnsafeBytes { buffer in
      unsafe clinux_send_nowait(socket, buffer.baseAddress, buffer.count)
    }
    if result == -Int(EAGAIN) || result == -Int(EINTR) { return 0 }
    return try check(result)
  }
}
