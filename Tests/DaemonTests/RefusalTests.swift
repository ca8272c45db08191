// SPDX-License-Identifier: Apache-2.0

import Foundation
import HandoverClient
import HandoverProtocol
import LinuxSystem
import SystemPackage
import TestSupport
import Testing

@Suite("The daemon says no")
struct RefusalTests {
  @Test("What it cannot start with is said in words, with status 1", arguments: Self.wrong)
  func starts(arguments: [String], words: String) throws {
    try withTemporaryDirectory { directory in
      _ = try makePatternImage(directory + "/base.img", regions: imageRegions([8]))
      try "text".write(toFile: directory + "/file", atomically: true, encoding: .utf8)
      let arguments = arguments.map { $0.replacing("DIR", with: directory) }
      let daemon = try DaemonProcess(in: directory, arguments, waits: false)
      #expect(daemon.wait() == (words.contains("--socket") ? 64 : 1))
      #expect(daemon.logged(words), "\(daemon.messages)")
    }
  }

  static let wrong: [([String], String)] = [
    ([], "--socket and --image are needed"),
    (["--socket", "DIR/s", "--image", "DIR/none.img"], "No such file"),
    (["--socket", "DIR/s", "--image", "DIR/file"], "it does not begin as an image does"),
    (["--socket", "DIR/file", "--image", "DIR/base.img"], "is there and is no socket"),
    (["--socket", "DIR/none/s", "--image", "DIR/base.img"], "No such file"),
    (
      ["--socket", "DIR/s", "--image", "DIR/base.img", "--control-socket", "DIR/none/c"],
      "the control socket"
    ),
    (["--socket", "DIR/s", "--image", "DIR/base.img", "--on-damage", "panic"], "stop-vmm"),
    (["--socket", "DIR/s", "--image", "DIR/base.img", "--metrics", "9090"], "HOST:PORT"),
    (["--socket", "DIR/s", "--image", "DIR/base.img", "--metrics", "192.0.2.1:0"], "metrics"),
    (["--socket", "DIR/s", "--image", "DIR/base.img", "--max-sessions", "0"], "1 to 65536"),
    (["--config", "DIR/none.yaml"], "it cannot be read"),
  ]

  @Test("A socket that another daemon answers on is left alone, a stale one is replaced")
  func socketInUse() throws {
    try withTemporaryDirectory { directory in
      let first = try Service(in: directory)
      let second = try faultline(
        "serve", "--socket", first.socket, "--image", directory + "/base.img")
      #expect(second.status == 1 && second.errors.contains("another daemon answers there"))
      #expect(try FirecrackerProcess(first.socket).finish() == ServeTests.right)
      first.daemon.send(SIGKILL)
      _ = first.daemon.wait()
      #expect(FileManager.default.fileExists(atPath: first.socket))
      let third = try Service(in: directory)
      #expect(try FirecrackerProcess(third.socket).finish() == ServeTests.right)
    }
  }

  @Test("A user who is not allowed is refused, and named in the log")
  func users() throws {
    try withTemporaryDirectory { directory in
      let service = try Service(in: directory, ["--allow-uid", "54321"])
      let guest = try FirecrackerProcess(service.socket)
      #expect(Delay.until { service.daemon.logged("may not hand over memory here") })
      guest.kill()
      #expect(try service.sessions().isEmpty)
      let metrics = try service.request("GET", "/metrics")
      #expect(metrics.contains("faultline_handovers_total{result=\"not_allowed\"} 1\n"))
    }
  }

  @Test("As many sessions as are allowed, and `busy` for another until one ends")
  func full() throws {
    try withTemporaryDirectory { directory in
      let service = try Service(
        in: directory, handover: "faultline", ["--max-sessions", "2"])
      let vmms = try (0..<3).map { _ in try FakeFirecracker(regions: 2, pages: 512) }
      let first = try attach(service, vmms[0])
      do {
        let second = try attach(service, vmms[1])
        for _ in 0..<3 {
          let error = #expect(throws: HandoverClientError.self) {
            _ = try attach(service, vmms[2])
          }
          #expect(error?.serviceCode == "busy", "\(String(describing: error))")
          #expect(error?.description.contains("the 2 sessions") == true)
        }
        #expect(try service.sessions().count == 2)
        #expect(try vmms[0].wrongBlocks() == 0)
        #expect(try vmms[1].wrongBlocks() == 0)
        withExtendedLifetime(second) {}
      }
      #expect(Delay.until { (try? service.sessions().count) == 1 })
      let third = try attach(service, vmms[2])
      #expect(try vmms[2].wrongBlocks() == 0)
      let metrics = try service.request("GET", "/metrics")
      #expect(metrics.contains("faultline_handovers_total{result=\"busy\"} 3\n"))
      withExtendedLifetime((first, third)) {}
    }
  }

  @Test("Nonsense on the sockets harms nobody")
  func nonsense() throws {
    try withTemporaryDirectory { directory in
      let service = try Service(in: directory)
      var generator = SystemRandomNumberGenerator()
      for _ in 0..<40 {
        for path in [service.socket, service.control] {
          let socket = try UnixSocket(connectingTo: FilePath(path))
          let bytes = (0..<Int.random(in: 0..<300, using: &generator)).map { _ in
            UInt8.random(in: 0...255, using: &generator)
          }
          try? socket.send(bytes)
        }
      }
      for request in [
        "GET / HTTP/1.1", "GET /v1/sessions/../../etc HTTP/1.1", "POST /v1/sessions HTTP/1.1",
        "DELETE /v1/sessions/99 HTTP/1.1",
      ] {
        let words = request.split(separator: " ").map(String.init)
        #expect(try service.request(words[0], words[1]).hasPrefix("HTTP/1.1 404"))
      }
      #expect(try FirecrackerProcess(service.socket).finish() == ServeTests.right)
      #expect(service.daemon.isRunning)
    }
  }

  @Test("An operator who may not is told")
  func noDaemon() throws {
    let answer = try faultline("ps", "--control-socket", "/nonexistent/control.sock")
    #expect(answer.status == 1)
    #expect(answer.errors.contains("Is `faultline serve` running"))
    #expect(try faultline("stats", "../x").status == 64)
  }
}
