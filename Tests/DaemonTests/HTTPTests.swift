// SPDX-License-Identifier: Apache-2.0

import Foundation
import LinuxSystem
import SystemPackage
import TestSupport
import Testing

@Suite("The control socket takes no more than it says")
struct HTTPTests {
  /// Sends bytes, and returns all that comes back.
  private func exchange(_ service: Service, _ pieces: [String]) throws -> String {
    let socket = try UnixSocket(connectingTo: FilePath(service.control))
    for piece in pieces {
      guard (try? socket.send(Array(piece.utf8))) != nil else { break }
    }
    var bytes: [UInt8] = []
    while let piece = try? socket.receive(limit: 1 << 16).bytes, !piece.isEmpty { bytes += piece }
    return String(decoding: bytes, as: UTF8.self)
  }

  @Test("Requests that are too long, or none, are refused with words")
  func refusals() throws {
    try withTemporaryDirectory { directory in
      let service = try Service(in: directory)
      let lines = (0..<6000).map { "X-\($0): \(String(repeating: "a", count: 30))\r\n" }
      let length = "GET /v1/health HTTP/1.1\r\nContent-Length: "
      for (request, answer) in [
        (["GET /v1/health HTTP/1.1\r\n"] + lines + ["\r\n"], "431 "),
        (["GET /\(String(repeating: "a", count: 200_000)) HTTP/1.1\r\n\r\n"], "431 "),
        (["nonsense\r\n\r\n"], "400 "), (["GET /v1/health\r\n\r\n"], "400 "),
        (["GET  /v1/health HTTP/1.1\r\n\r\n"], "400 "),
        (["GET /v1/health HTTP/1.1\r\nno colon\r\n\r\n"], "400 "),
        ([length + "65537\r\n\r\n"], "413 "), ([length + "99999999999999999999\r\n\r\n"], "413 "),
        ([length + "-1\r\n\r\n"], "400 "), ([length + "1\r\nContent-Length: 2\r\n\r\n"], "400 "),
        (["POST /v1/sessions/1/fill HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"], "411 "),
        ([length + "3\r\n\r\n", "a", "bc"], "200 "),
        (["GET /v1/health HTTP/1.1\r", "\n\r", "\n"], "200 "),
        (["HEAD /v1/health HTTP/1.0\r\n\r\n"], "200 "),
      ] {
        let text = try exchange(service, request)
        #expect(text.hasPrefix("HTTP/1.1 \(answer)"), "\(request[0].prefix(50)): \(text)")
      }
      let expecting = try exchange(
        service,
        ["POST /v1/sessions/1/fill HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n"])
      #expect(expecting.hasPrefix("HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 408"), "\(expecting)")
      // Of 12 MB of headers nothing was kept.
      #expect(service.daemon.anonymousKiB < 100 << 10)
    }
  }

  @Test("Clients that send nothing, a byte now and then, or never read hold up no operator")
  func silence() throws {
    try withTemporaryDirectory { directory in
      let service = try Service(in: directory)
      let threads = service.daemon.count("task")
      var clients: [SilentOperator] = []
      for number in 0..<200 {
        let client = try SilentOperator(service.control)
        if number % 2 == 1 { try? client.socket.send(Array("GET /v1/he".utf8)) }
        clients.append(client)
      }
      #expect(try service.sessions().isEmpty)
      #expect(try service.request("GET", "/v1/health").hasPrefix("HTTP/1.1 200"))
      #expect(service.daemon.count("task") <= threads + 17)
      // Some wait yet: they were not what was waited for.
      #expect(clients.contains { (try? $0.socket.isReadable) == false })
      service.daemon.send(SIGTERM)
      #expect(service.daemon.wait() == 0)
    }
  }
}

private final class SilentOperator: Sendable {
  let socket: UnixSocket
  init(_ path: String) throws { socket = try UnixSocket(connectingTo: FilePath(path)) }
}
