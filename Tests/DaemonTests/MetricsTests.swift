// SPDX-License-Identifier: Apache-2.0

import Foundation
import TestSupport
import Testing

@Suite("Metrics and health of the daemon")
struct MetricsTests {
  /// A daemon that offers metrics on a port that is free, and that port.
  private func withMetrics(
    launcher: [String] = [], _ body: (Service, UInt16) throws -> Void
  ) throws {
    try withTemporaryDirectory { directory in
      let service = try Service(
        in: directory, ["--metrics", "127.0.0.1:0"], launcher: launcher)
      let text = try #require(
        service.daemon.messages.components(separatedBy: "metrics on 127.0.0.1:").last)
      let port = try #require(UInt16(text.prefix { $0.isNumber }))
      try #require(port > 0)
      try body(service, port)
    }
  }

  @Test("What was served is counted, also after the session's end")
  func counts() throws {
    try withMetrics { service, port in
      #expect(try FirecrackerProcess(service.socket).finish() == ServeTests.right)
      #expect(Delay.until { (try? service.sessions().isEmpty) == true })
      let text = try Peer(port).exchange("GET /metrics?x=1 HTTP/1.1\r\nHost: x\r\n\r\n")
      let parts = text.components(separatedBy: "\r\n\r\n")
      #expect(parts.count == 2 && parts[0].hasPrefix("HTTP/1.1 200 OK\r\n"))
      #expect(parts[0].contains("text/plain; version=0.0.4"))
      let values = try Self.values(try #require(parts.last))
      #expect(values["faultline_sessions"] == 0)
      #expect(values["faultline_handovers_total{result=\"accepted\"}"] == 1)
      let faults = try #require(values["faultline_faults_total{kind=\"missing\"}"])
      #expect(faults > 0)
      let data = (0..<1024).count { PatternSource.word(block: $0, seed: 7) != 0 }
      #expect(values["faultline_pages_total{resolution=\"copied\"}"] == Double(data))
      #expect(values["faultline_pages_total{resolution=\"failed\"}"] == 0)
      #expect(values["faultline_events_total{kind=\"remove\"}"] == 2)
      #expect(values["faultline_bytes_total"] == Double(data * 4096))
      // The histogram goes up to its count.
      let buckets = values.filter { $0.key.hasPrefix("faultline_fault_seconds_bucket") }
      let count = try #require(values["faultline_fault_seconds_count"])
      #expect(buckets.count == 24 && count > 0 && count <= faults)
      #expect(values["faultline_fault_seconds_bucket{le=\"+Inf\"}"] == count)
      #expect(buckets.values.allSatisfy { $0 <= count })
      // The same on the control socket.
      #expect(try service.request("GET", "/metrics").contains("faultline_sessions 0\n"))
    }
  }

  @Test("Health is known to everybody, control to nobody there")
  func health() throws {
    try withMetrics { _, port in
      for (request, answer) in [
        ("GET /v1/health HTTP/1.1", "200 OK"), ("HEAD /health HTTP/1.0", "200 OK"),
        ("GET /v1/sessions HTTP/1.1", "404 Not Found"),
        ("DELETE /v1/sessions/1 HTTP/1.1", "405 Method Not Allowed"),
        ("nonsense", "400 Bad Request"),
        ("GET /\(String(repeating: "a", count: 9000)) HTTP/1.1", "431 "),
      ] {
        let text = try Peer(port).exchange(request + "\r\n\r\n")
        #expect(text.hasPrefix("HTTP/1.1 \(answer)"), "\(request.prefix(40)): \(text)")
        #expect(text.contains("\"status\":\"ok\"") == request.contains("GET /v1/health"))
      }
    }
  }

  @Test("Connections that say nothing take no place for ever, nor descriptors of VMMs")
  func idleConnections() throws {
    try withMetrics { service, port in
      let before = service.daemon.descriptorCount
      let idle = try (0..<200).map { _ in try Peer(port) }
      let text = try Peer(port).exchange("GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
      #expect(text.contains("faultline_sessions 0\n"))
      #expect(service.daemon.descriptorCount <= before + 70)
      #expect(try FirecrackerProcess(service.socket).finish() == ServeTests.right)
      withExtendedLifetime(idle) {}
    }
  }

  @Test("With too many open files VMMs wait or are refused, and then all is as before")
  func noDescriptors() throws {
    let limit = ["/bin/sh", "-c", "ulimit -n 40; exec \"$@\"", "sh"]
    try withMetrics(launcher: limit) { service, port in
      do {
        let guests = try (0..<10).map { _ in try FirecrackerProcess(service.socket) }
        #expect(Delay.until { service.daemon.count("fd") >= 38 })
        // The control socket may fail now, but it comes back.
        _ = try? service.sessions()
        for guest in guests { guest.kill() }
      }
      #expect(Delay.until { (try? service.sessions().isEmpty) == true })
      #expect(try FirecrackerProcess(service.socket).finish() == ServeTests.right)
      let text = try Peer(port).exchange("GET /health HTTP/1.1\r\n\r\n")
      #expect(text.hasPrefix("HTTP/1.1 200 OK"))
    }
  }

  /// The samples of Prometheus' text format; each has a name and a number.
  private static func values(_ text: String) throws -> [String: Double] {
    var values: [String: Double] = [:]
    for line in text.split(separator: "\n") where !line.hasPrefix("#") {
      let words = line.split(separator: " ")
      try #require(words.count == 2 && values[String(words[0])] == nil, "\(line)")
      let value: Double = try #require(Double(String(words[1])))
      values[String(words[0])] = value
    }
    return values
  }
}

/// A TCP connection to a port of this machine.
final class Peer {
  private let descriptor: CInt

  init(_ port: UInt16) throws {
    descriptor = socket(AF_INET, CInt(SOCK_STREAM.rawValue) | CInt(SOCK_CLOEXEC.rawValue), 0)
    var address = sockaddr_in()
    address.sin_family = sa_family_t(AF_INET)
    address.sin_port = port.bigEndian
    address.sin_addr.s_addr = UInt32(0x7f00_0001).bigEndian
    let result = unsafe withUnsafePointer(to: &address) { pointer in
      unsafe pointer.withMemoryRebound(to: sockaddr.self, capacity: 1) {
        // SAFETY: the length is that of what the pointer points to.
        unsafe connect(descriptor, $0, socklen_t(MemoryLayout<sockaddr_in>.size))
      }
    }
    try #require(result == 0, "connect: \(errno)")
  }

  deinit { close(descriptor) }

  /// Sends a text and returns all that comes until the other side closes.
  func exchange(_ text: String) throws -> String {
    let bytes = Array(text.utf8)
    let sent = unsafe send(descriptor, bytes, bytes.count, CInt(MSG_NOSIGNAL))
    try #require(sent == bytes.count)
    var answer: [UInt8] = []
    var piece = [UInt8](repeating: 0, count: 65_536)
    while true {
      let count = unsafe recv(descriptor, &piece, piece.count, 0)
      guard count > 0 else { break }
      answer += piece.prefix(count)
    }
    return String(decoding: answer, as: UTF8.self)
  }
}
