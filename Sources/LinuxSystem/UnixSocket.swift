// SPDX-License-Identifier: Apache-2.0

internal import CLinux
public import SystemPackage

/// A connected Unix stream socket that can carry descriptors (unix(7)).
@frozen
public struct UnixSocket: ~Copyable, Sendable {
  /// The socket.
  public let descriptor: OwnedDescriptor

  /// Takes over a connected socket.
  public init(owning descriptor: consuming OwnedDescriptor) { self.descriptor = descriptor }

  /// Connects to a listener's path.
  ///
  /// - Parameter waits: `false` throws `resourceTemporarilyUnavailable` in place of waiting when the
  ///   listener's queue is full.
  public init(connectingTo path: FilePath, waits: Bool = true) throws(Errno) {
    let socket = OwnedDescriptor(owning: CInt(try check(clinux_socket_stream())))
    if !waits { try socket.setNonBlocking(true) }
    var address = try UnixListener.address(of: path)
    _ = try unsafe check(
      clinux_connect(socket.rawValue, &address, socklen_t(MemoryLayout<sockaddr_un>.size)))
    if !waits { try socket.setNonBlocking(false) }
    descriptor = socket
  }

  /// Two sockets connected to each other (socketpair(2)); close-on-exec.
  @frozen
  public struct Pair: ~Copyable, Sendable {
    /// One end.
    public var first: UnixSocket
    /// The other end.
    public var second: UnixSocket
  }

  /// Makes two sockets that are connected to each other.
  public static func pair() throws(Errno) -> Pair {
    var numbers: (CInt, CInt) = (-1, -1)
    let result = unsafe withUnsafeMutableBytes(of: &numbers) { bytes in
      // SAFETY: a tuple of two CInt is laid out as int[2].
      unsafe clinux_socketpair(bytes.assumingMemoryBound(to: CInt.self).baseAddress)
    }
    _ = try check(result)
    return Pair(
      first: UnixSocket(owning: OwnedDescriptor(owning: numbers.0)),
      second: UnixSocket(owning: OwnedDescriptor(owning: numbers.1)))
  }

  /// Sends all bytes, with the descriptors on the first of them (SCM_RIGHTS). At
  /// most 16 descriptors; they stay open here.
  public borrowing func send(_ bytes: [UInt8], descriptors: [CInt] = []) throws(Errno) {
    var sent = 0
    while sent < bytes.count {
      let passed = sent == 0 ? descriptors : []
      let socket = descriptor.rawValue
      sent += try retryingInterrupted {
        unsafe bytes.withUnsafeBytes { buffer in
          unsafe passed.withUnsafeBufferPointer { numbers in
            unsafe clinux_send_descriptors(
              socket, buffer.baseAddress.unsafelyUnwrapped + sent, buffer.count - sent,
              numbers.baseAddress, numbers.count)
          }
        }
      }
    }
  }

  /// Receives what is there, at most `limit` bytes and `descriptorLimit`
  /// descriptors; no bytes means that the peer has closed.
  ///
  /// The caller owns the descriptors. More of them than allowed: all are closed and
  /// `messageTooLong` is thrown.
  public borrowing func receive(
    limit: Int, descriptorLimit: Int = 16
  ) throws(Errno) -> (bytes: [UInt8], descriptors: [CInt]) {
    var bytes = [UInt8](repeating: 0, count: limit)
    var numbers = [CInt](repeating: -1, count: descriptorLimit)
    var count = 0
    let socket = descriptor.rawValue
    let received = try retryingInterrupted {
      count = descriptorLimit
      return unsafe bytes.withUnsafeMutableBytes { buffer in
        unsafe numbers.withUnsafeMutableBufferPointer { room in
          unsafe clinux_receive_descriptors(
            socket, buffer.baseAddress, buffer.count, room.baseAddress, &count)
        }
      }
    }
    return (Array(bytes.prefix(received)), Array(numbers.prefix(count)))
  }
}

/// A Unix stream socket that accepts connections under a path.
public struct UnixListener: ~Copyable, Sendable {
  /// The listening socket.
  public let descriptor: OwnedDescriptor

  /// Binds and listens. `addressInUse` when the path exists.
  public init(path: FilePath, backlog: CInt = 16) throws(Errno) {
    let socket = OwnedDescriptor(owning: CInt(try check(clinux_socket_stream())))
    var address = try Self.address(of: path)
    _ = try unsafe check(
      clinux_bind(socket.rawValue, &address, socklen_t(MemoryLayout<sockaddr_un>.size)))
    _ = try check(clinux_listen(socket.rawValue, backlog))
    descriptor = socket
  }

  /// Takes over a socket that listens already, such as one of systemd's.
  public init(owning descriptor: consuming OwnedDescriptor) { self.descriptor = descriptor }

  /// Waits for the next connection.
  public borrowing func accept() throws(Errno) -> UnixSocket {
    let listener = descriptor.rawValue
    let accepted = try retryingInterrupted { clinux_accept(listener) }
    return UnixSocket(owning: OwnedDescriptor(owning: CInt(accepted)))
  }

  static func address(of path: FilePath) throws(Errno) -> sockaddr_un {
    var address = sockaddr_un()
    address.sun_family = sa_family_t(AF_UNIX)
    let bytes = Array(path.string.utf8)
    guard bytes.count < MemoryLayout.size(ofValue: address.sun_path) else {
      throw .fileNameTooLong
    }
    unsafe withUnsafeMutableBytes(of: &address.sun_path) { room in
      unsafe room.copyBytes(from: bytes)
    }
    return address
  }
}
