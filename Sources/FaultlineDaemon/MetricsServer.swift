// SPDX-License-Identifier: Apache-2.0

internal import DaemonConfiguration
internal import Glibc
internal import LinuxSystem
internal import Logging
internal import Synchronization
internal import SystemPackage

/// What is answered to one request.
struct PlainAnswer: Sendable {
  var status = "200 OK"
  var contentType = "application/json"
  var body: String
}

/// Answers `GET` on a TCP address, to whoever can connect. So all of it is bounded: connections at
/// a time, a request's bytes, and the time for it. Each connection is one request.
///
/// FlyingFox is for the control socket only, whose peers are trusted: it has no limit for
/// connections, for a request's length or for the time that one may take.
final class MetricsServer: Sendable {
  private static var connectionLimit: Int { 16 }
  private static var headLimit: Int { 8192 }
  private static var timeLimit: UInt64 { 5_000_000_000 }

  /// Where it listens, with the port that the kernel chose.
  let address: NetworkAddress
  /// Of TCP; what is used of it is the same for both.
  private let listener: UnixListener
  private let stopSign: EventDescriptor
  private let connections = Monitor(0)
  private let thread = Mutex<JoinedThread?>(nil)
  private let log: Logger

  /// Listens; nothing is answered before `start`.
  init(_ address: NetworkAddress, log: Logger) throws(DaemonError) {
    self.log = log
    do throws(Errno) {
      stopSign = try EventDescriptor()
      listener = UnixListener(owning: try Self.listen(on: address))
      try listener.descriptor.setNonBlocking(true)
      self.address = NetworkAddress(
        host: address.host, port: try Self.port(of: listener.descriptor.rawValue))
    } catch {
      throw DaemonError(
        "the metrics cannot be offered on \(address): \(error). Name another address with "
          + "--metrics, or one of this machine.")
    }
  }

  /// Begins to answer.
  ///
  /// - Parameter answer: to a path, without its query; `nil` when there is nothing. Called from
  ///   threads of the server.
  func start(_ answer: @escaping @Sendable (String) -> PlainAnswer?) throws(Errno) {
    let thread = JoinedThread(
      try NamedThread(name: "metrics") { [self] in accept(answer) })
    self.thread.withLock { $0 = thread }
  }

  /// Ends it, and the requests that are under way.
  func stop() {
    stopSign.signal()
    thread.withLock { $0 }?.join()
    connections.wait { $0 == 0 ? () : nil }
  }

  // MARK: - Connections

  private func accept(_ answer: @escaping @Sendable (String) -> PlainAnswer?) {
    let set = PollSet(listener.descriptor.rawValue, stopSign.descriptor.rawValue)
    while true {
      guard let ready = try? set.wait() else { continue }
      if ready.tag == 1 { return }
      do throws(Errno) {
        let socket = SocketBox(try listener.accept())
        connections.wait { count -> Void? in
          guard count < Self.connectionLimit else { return nil }
          count += 1
          return ()
        }
        do throws(Errno) {
          _ = try NamedThread(name: "scrape") { [self] in
            if let socket = socket.take() { serve(socket, answer) }
            connections.withLock { $0 -= 1 }
          }
        } catch {
          connections.withLock { $0 -= 1 }
          throw error
        }
      } catch {
        // It went away, or there are too many open files: it is tried again.
        log.debug("a request for metrics was not taken: \(error)")
        if error != .resourceTemporarilyUnavailable { Pause.milliseconds(100) }
      }
    }
  }

  private func serve(
    _ socket: consuming UnixSocket, _ answer: (String) -> PlainAnswer?
  ) {
    let deadline = MonotonicClock.nanoseconds + Self.timeLimit
    do throws(Errno) {
      var head: [UInt8] = []
      while !Self.isComplete(head), head.count <= Self.headLimit {
        try socket.waitUntilReadable(before: deadline, stopSign: stopSign.descriptor.rawValue)
        let piece = try socket.receive(limit: 4096, descriptorLimit: 1).bytes
        guard !piece.isEmpty else { return }
        head += piece
      }
      var bytes = Self.response(to: head, answer)[...]
      while !bytes.isEmpty, MonotonicClock.nanoseconds < deadline {
        let sent = try socket.sendWithoutWaiting(Array(bytes))
        bytes = bytes.dropFirst(sent)
        if sent == 0 { Pause.milliseconds(5) }
      }
      // What it still sends would reset the connection before it has read the answer.
      shutdown(socket.descriptor.rawValue, CInt(SHUT_WR))
      try socket.waitUntilReadable(before: deadline, stopSign: stopSign.descriptor.rawValue)
      _ = try socket.receive(limit: 4096, descriptorLimit: 1)
    } catch {
      log.debug("a request for metrics ended early: \(error)")
    }
  }

  private static func isComplete(_ head: [UInt8]) -> Bool {
    String(decoding: head, as: UTF8.self).contains("\r\n\r\n")
  }

  private static func response(to head: [UInt8], _ answer: (String) -> PlainAnswer?) -> [UInt8] {
    let line = head.prefix { $0 != UInt8(ascii: "\r") }
    let words = String(decoding: line, as: UTF8.self).split(separator: " ")
    let isHead = words.first == "HEAD"
    let found: PlainAnswer
    if head.count > headLimit {
      found = PlainAnswer(
        status: "431 Request Header Fields Too Large",
        body: "{\"error\":\"a request has at most \(headLimit) bytes\"}\n")
    } else if words.count != 3 || !words[2].hasPrefix("HTTP/1.") {
      found = PlainAnswer(
        status: "400 Bad Request", body: "{\"error\":\"it is not HTTP/1.1\"}\n")
    } else if words[0] != "GET" && !isHead {
      found = PlainAnswer(
        status: "405 Method Not Allowed", body: "{\"error\":\"there is GET only\"}\n")
    } else {
      let path = words[1].prefix { $0 != "?" }
      found =
        answer(String(path))
        ?? PlainAnswer(
          status: "404 Not Found", body: "{\"error\":\"there are /metrics and /v1/health\"}\n")
    }
    let text =
      "HTTP/1.1 \(found.status)\r\nContent-Type: \(found.contentType)\r\n"
      + "Content-Length: \(found.body.utf8.count)\r\nConnection: close\r\n\r\n"
    return Array((isHead ? text : text + found.body).utf8)
  }

  // MARK: - The socket

  private static func listen(on address: NetworkAddress) throws(Errno) -> OwnedDescriptor {
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
    return descriptor
  }

  private static func port(of descriptor: CInt) throws(Errno) -> UInt16 {
    var address = sockaddr_in6()
    var length = socklen_t(MemoryLayout<sockaddr_in6>.size)
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
