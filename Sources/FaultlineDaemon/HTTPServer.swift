// SPDX-License-Identifier: Apache-2.0

internal import DaemonConfiguration
internal import Glibc
internal import LinuxSystem
internal import Logging
internal import Synchronization
internal import SystemPackage

/// A client that has not sent all of its request yet.
final class HTTPClient: WaitingClient {
  let descriptor: CInt
  let user: UInt32
  private struct State: ~Copyable {
    /// Taken out by the thread that goes on with it.
    var socket: UnixSocket?
    var assembler = HTTPAssembler()
    var answer: HTTPAnswer?
    var request: HTTPRequest?
    var descriptors = DescriptorList()
  }
  private let state: Mutex<State>

  init(_ socket: consuming UnixSocket) {
    descriptor = socket.descriptor.rawValue
    user = (try? socket.peer.userID) ?? 0
    state = Mutex(State(socket: consume socket))
  }

  var descriptorCount: Int { state.withLock { $0.descriptors.count } }

  func collect() -> Bool {
    state.withLock { state in
      let piece: [UInt8]?
      do throws(Errno) {
        piece = try state.socket?.receiveWithoutWaiting(
          limit: 16 << 10, into: &state.descriptors)
        // No request has any. They are closed where the client is let go of.
        if state.descriptors.count > 0 { throw .messageTooLong }
      } catch {
        return true
      }
      guard let piece else { return false }
      // It closed before it had sent all: there is nobody to answer.
      guard !piece.isEmpty else { return true }
      switch state.assembler.add(piece) {
      case .incomplete: return false
      case .expectsContinue:
        _ = try? state.socket?.sendWithoutWaiting(Array("HTTP/1.1 100 Continue\r\n\r\n".utf8))
        return false
      case .request(let request): state.request = request
      case .refused(let answer): state.answer = answer
      }
      return true
    }
  }

  func reject(_ rejection: Rejection) {
    let status = rejection == .timedOut ? 408 : 503
    let bytes = HTTPAnswer.failure(status, rejection.reason).bytes(forHead: false)
    state.withLock { state in
      _ = try? state.socket?.sendWithoutWaiting(bytes)
      if state.socket != nil { shutdown(descriptor, CInt(SHUT_RDWR)) }
    }
  }

  func close() {
    state.withLock { state in
      state.socket = nil
      state.descriptors = DescriptorList()
    }
  }

  /// Answers, and closes the connection. The client gets some time for reading it.
  func answer(for nanoseconds: UInt64, _ answer: (HTTPRequest) -> HTTPAnswer) {
    let (request, refusal) = state.withLock { ($0.request, $0.answer) }
    guard let socket = state.withLock({ $0.socket.take() }) else { return }
    guard let found = refusal ?? request.map(answer) else { return }
    let deadline = MonotonicClock.nanoseconds + nanoseconds
    var bytes = found.bytes(forHead: request?.method == "HEAD")[...]
    do throws(Errno) {
      while !bytes.isEmpty, MonotonicClock.nanoseconds < deadline {
        let sent = try socket.sendWithoutWaiting(Array(bytes.prefix(1 << 18)))
        bytes = bytes.dropFirst(sent)
        if sent == 0 { Pause.milliseconds(2) }
      }
      guard request == nil else { return }
      // What it still sends would reset the connection before it has read the answer.
      shutdown(socket.descriptor.rawValue, CInt(SHUT_WR))
      for _ in 0..<64 {
        try socket.waitUntilReadable(before: deadline)
        guard try !socket.receive(limit: 16 << 10).bytes.isEmpty else { return }
      }
    } catch {
      // It is gone.
    }
  }
}

/// Answers requests on a socket: of operators, or on a TCP address of whoever can connect. So all
/// of it is bounded: connections at a time, a request's bytes, and the time for it. Each connection
/// is one request.
final class HTTPServer: Sendable {
  private static var timeLimit: UInt64 { 5_000_000_000 }
  private let reception: Reception<HTTPClient>

  /// Listens; nothing is answered before `start`.
  ///
  /// - Parameter answer: called from threads of `threads`.
  init(
    _ listener: consuming UnixListener, name: String, _ threads: DaemonThreads, log: Logger,
    answer: @escaping @Sendable (HTTPRequest) -> HTTPAnswer
  ) throws(Errno) {
    reception = try Reception(
      listener, name: name, limits: .init(places: 64, nanoseconds: Self.timeLimit, queue: 64),
      workers: threads.requests, closers: threads.closers, log: log,
      make: { HTTPClient($0) },
      handle: { client in
        client.answer(for: Self.timeLimit, answer)
        return .done
      })
  }

  func start() throws(Errno) { try reception.start() }

  /// Ends it, and waits some time for requests that are under way.
  func stop(milliseconds: UInt64) { reception.stop(milliseconds: milliseconds) }

  /// The port that the kernel chose, of a TCP address.
  var port: UInt16 {
    get throws(Errno) {
      var address = sockaddr_in6()
      var length = socklen_t(MemoryLayout<sockaddr_in6>.size)
      let descriptor = reception.descriptor
      let result = unsafe withUnsafeMutablePointer(to: &address) { pointer in
        unsafe pointer.withMemoryRebound(to: sockaddr.self, capacity: 1) { address in
          // SAFETY: `length` is the size of what `address` points to.
          unsafe getsockname(descriptor, address, &length)
        }
      }
      guard result == 0 else { throw Errno(rawValue: errno) }
      // The port is at the same place in an address of IPv4.
      return UInt16(bigEndian: address.sin6_port)
    }
  }

  /// A TCP socket that listens on an address; what is used of it is the same as of a Unix socket.
  static func listen(on address: NetworkAddress) throws(Errno) -> UnixListener {
    var hints = unsafe addrinfo()
    unsafe hints.ai_socktype = CInt(SOCK_STREAM.rawValue)
    unsafe hints.ai_flags = AI_PASSIVE
    var list: UnsafeMutablePointer<addrinfo>?
    guard unsafe getaddrinfo(address.host, "\(address.port)", &hints, &list) == 0,
      let first = unsafe list
    else { throw .addressNotAvailable }
    // SAFETY: the list is the caller's until it is freed, and has at least one entry.
    defer { unsafe freeaddrinfo(first) }
    let flags = CInt(SOCK_STREAM.rawValue) | CInt(SOCK_CLOEXEC.rawValue)
    let number = unsafe socket(first.pointee.ai_family, flags, 0)
    guard number >= 0 else { throw Errno(rawValue: errno) }
    let descriptor = OwnedDescriptor(owning: number)
    var yes: CInt = 1
    _ = unsafe setsockopt(
      number, SOL_SOCKET, SO_REUSEADDR, &yes, socklen_t(MemoryLayout<CInt>.size))
    guard unsafe bind(number, first.pointee.ai_addr, first.pointee.ai_addrlen) == 0,
      Glibc.listen(number, 64) == 0
    else { throw Errno(rawValue: errno) }
    return UnixListener(owning: descriptor)
  }
}
