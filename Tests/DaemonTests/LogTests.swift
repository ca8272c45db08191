// SPDX-License-Identifier: Apache-2.0

import Foundation
import LinuxSystem
import SystemPackage
import TestSupport
import Testing

/// Hand-overs that are refused, with a line in the log for each.
func sendNonsense(_ socket: String, count: Int) throws {
  for _ in 0..<count {
    let connection = try UnixSocket(connectingTo: FilePath(socket))
    try? connection.send(Array("nonsense".utf8))
    _ = try? connection.receive(limit: 1)
  }
}

@Suite("The daemon's log")
struct LogTests {
  /// Where lines cannot be written to.
  enum Sink: String, CaseIterable { case closed, full, readerGone, nobodyReads }

  @Test(
    "One that cannot be written, or is not read, ends and holds up nothing",
    arguments: Sink.allCases)
  func unwritable(_ sink: Sink) throws {
    try withTemporaryDirectory { directory in
      let pipe = directory + "/pipe"
      #expect(unsafe mkfifo(pipe, 0o600) == 0)
      let end = OwnedDescriptor(owning: unsafe open(pipe, O_RDWR | O_CLOEXEC))
      // A page, which is full soon.
      let setPipeSize: CInt = 1031
      _ = fcntl(end.rawValue, setPipeSize, 4096)
      let redirection =
        switch sink {
        case .closed: "2>&-"
        case .full: "2>/dev/full"
        case .readerGone, .nobodyReads: "2>'\(pipe)'"
        }
      let service = try Service(
        in: directory, launcher: ["/bin/sh", "-c", "exec \"$@\" \(redirection)", "sh"],
        logsToFile: false)
      // Both ends of it are in the one descriptor.
      var reader = Optional(end)
      if sink == .readerGone { reader = nil }
      try sendNonsense(service.socket, count: 150)
      let guest = try FirecrackerProcess(service.socket)
      #expect(try guest.finish() == ServeTests.right)
      #expect(Delay.until { (try? service.sessions().isEmpty) == true })
      let metrics = try service.request("GET", "/metrics")
      #expect(metrics.contains("faultline_handovers_total{result=\"malformed\"} 150\n"))
      #expect(try service.metric("faultline_log_lines_dropped_total{reason=\"rate\"}") > 0)
      let failed = try service.metric("faultline_log_lines_dropped_total{reason=\"write\"}")
      // What is closed is /dev/null from the start: nothing else may get its number.
      #expect((failed > 0) == (sink == .full || sink == .readerGone), "\(failed)")
      service.daemon.send(SIGTERM)
      #expect(service.daemon.wait() == 0)
      withExtendedLifetime(reader) {}
    }
  }

  @Test("A storm of lines from one side is bounded, counted, and hides no other's")
  func storm() throws {
    try withTemporaryDirectory { directory in
      let service = try Service(in: directory, ["--log-level", "info"])
      try sendNonsense(service.socket, count: 2000)
      #expect(try FirecrackerProcess(service.socket).finish() == ServeTests.right)
      #expect(Delay.until { service.daemon.logged("session 1 has ended") })
      #expect(Delay.until { service.daemon.logged("lines were left out") })
      let lines = service.daemon.messages.split(separator: "\n")
      let refused = lines.count { $0.contains("hand-over from process") }
      #expect((1..<1000).contains(refused))
      let left = try service.metric("faultline_log_lines_dropped_total{reason=\"rate\"}")
      #expect(left == 2000 - refused)
      service.daemon.send(SIGTERM)
      #expect(service.daemon.wait() == 0)
      // All that was counted is said by the end.
      let said = service.daemon.messages.split(separator: "\n").reduce(0) { sum, line in
        line.components(separatedBy: " lines were left out").dropLast().reduce(sum) {
          $0 + (Int($1.split(separator: " ").last ?? "") ?? 0)
        }
      }
      #expect(said == left)
    }
  }

  @Test("Control characters forge no line, and a line has an end", arguments: ["text", "json"])
  func forgery(format: String) throws {
    try withTemporaryDirectory { directory in
      _ = try makePatternImage(directory + "/base.img", regions: imageRegions([512, 512]))
      let evil = #"\e[31m\r\n2026-01-01 info: forged\u0085\u2028\u202e\u009b\ta\"b\\"#
      let text = """
        listen:
          - socket: \(directory)/evil.sock
            image: "\(directory)/\(evil)/{uid}.img"
          - socket: \(directory)/long.sock
            image: "\(directory)/\(String(repeating: "ü", count: 6000))/{uid}.img"
        log-format: \(format)
        """
      try text.write(toFile: directory + "/c.yaml", atomically: true, encoding: .utf8)
      let daemon = try DaemonProcess(in: directory, ["--config", directory + "/c.yaml"])
      for name in ["evil", "long"] {
        let guest = try FirecrackerProcess("\(directory)/\(name).sock")
        let path = name == "evil" ? "forged" : "üüü"
        #expect(
          Delay.until {
            daemon.messages.split(separator: "\n").contains {
              $0.contains("hand-over") && $0.contains(path)
            }
          })
        guest.kill()
      }
      daemon.send(SIGTERM)
      #expect(daemon.wait() == 0)
      let messages = daemon.messages
      #expect(messages.hasSuffix("\n"))
      let lines = messages.split(separator: "\n", omittingEmptySubsequences: false).dropLast()
      var found = Set<String>()
      for line in lines {
        #expect(line.utf8.count < 4096)
        #expect(
          line.unicodeScalars.allSatisfy {
            ![.control, .format, .lineSeparator, .paragraphSeparator].contains(
              $0.properties.generalCategory)
          }, "\(line)")
        var message = String(line)
        if format == "json" {
          let object = try JSONDecoder().decode([String: String].self, from: Data(line.utf8))
          message = try #require(object["message"])
          if message.contains(
            "\u{1b}[31m\r\n2026-01-01 info: forged\u{85}\u{2028}\u{202e}\u{9b}\ta\"b\\")
          {
            found.insert("evil")
          }
        } else if line.contains(
          #"\u{1b}[31m\r\n2026-01-01 info: forged\u{85}\u{2028}\u{202e}\u{9b}\ta"b\/"#)
        {
          found.insert("evil")
        }
        if message.contains("üüü"), message.contains("bytes more") { found.insert("long") }
      }
      #expect(found == ["evil", "long"], "\(messages)")
    }
  }
}
