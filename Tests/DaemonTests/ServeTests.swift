// SPDX-License-Identifier: Apache-2.0

import Foundation
import TestSupport
import Testing

@Suite("The daemon serves")
struct ServeTests {
  static let right = "sent\nwrong 0\nnot zero 0\n"

  @Test("Several Firecrackers on one socket get their memory, in pieces or at once")
  func firecrackers() throws {
    try withTemporaryDirectory { directory in
      let service = try Service(in: directory)
      let guests = try [1 << 20, 1, 37, 1 << 20].map { piece in
        try FirecrackerProcess(service.socket, piece: piece)
      }
      #expect(Delay.until { (try? service.sessions().count) == 4 })
      for guest in guests { #expect(try guest.finish() == Self.right) }
      #expect(Delay.until { (try? service.sessions().isEmpty) == true })
      service.daemon.send(SIGTERM)
      #expect(service.daemon.wait() == 0)
      #expect(service.daemon.logged("session 4 has ended"))
      // Nothing is left under the names of its sockets.
      #expect(!FileManager.default.fileExists(atPath: service.socket))
      #expect(!FileManager.default.fileExists(atPath: service.control))
    }
  }

  @Test("A guest that runs when the daemon drains runs on without it")
  func drains() throws {
    try withTemporaryDirectory { directory in
      let service = try Service(in: directory)
      let guest = try FirecrackerProcess(service.socket)
      #expect(Delay.until { (try? service.sessions().count) == 1 })
      // It may touch its memory before, during and after that.
      service.daemon.send(SIGTERM)
      #expect(service.daemon.wait() == 0)
      #expect(try guest.finish() == Self.right)
    }
  }

  @Test("`stop` fills a session and lets it go, and `ps` and `stats` say what is there")
  func stop() throws {
    try withTemporaryDirectory { directory in
      let service = try Service(in: directory)
      let guest = try FirecrackerProcess(service.socket)
      #expect(Delay.until { (try? service.sessions().count) == 1 })
      let table = try faultline("ps", "--control-socket", service.control)
      let lines = table.output.split(separator: "\n")
      #expect(lines.count == 2 && lines[0].hasPrefix("ID") && lines[1].contains("base.img"))
      #expect(lines[1].contains(" \(guest.identifier) "))
      let stats = try faultline("stats", "1", "--control-socket", service.control)
      #expect(stats.status == 0 && stats.output.contains("missing faults"))
      let stopped = try faultline("stop", "1", "--control-socket", service.control)
      #expect(stopped.output == "session 1 is let go of\n", "\(stopped)")
      #expect(try service.sessions().isEmpty)
      #expect(try guest.finish() == Self.right)
      let gone = try faultline("stats", "1", "--control-socket", service.control)
      #expect(gone.status == 1 && gone.errors.contains("there is no session 1"))
    }
  }

  @Test("A configuration file gives several sockets, and an error names its line")
  func configurationFile() throws {
    try withTemporaryDirectory { directory in
      _ = try makePatternImage(directory + "/base.img", regions: imageRegions([512, 512]))
      let file = directory + "/config.yaml"
      let text = """
        listen:
          - socket: \(directory)/a.sock
            image: \(directory)/base.img
          - socket: \(directory)/b.sock
            image: \(directory)/base.img
        log-format: json
        """
      try text.write(toFile: file, atomically: true, encoding: .utf8)
      let daemon = try DaemonProcess(in: directory, ["--config", file])
      for name in ["a", "b"] {
        #expect(try FirecrackerProcess(directory + "/\(name).sock").finish() == Self.right)
      }
      daemon.send(SIGINT)
      #expect(daemon.wait() == 0)
      let first = try #require(daemon.messages.split(separator: "\n").first)
      let object = try JSONDecoder().decode([String: String].self, from: Data(first.utf8))
      #expect(object["level"] == "info" && object["message"]?.hasPrefix("ready") == true)
      try (text + "\nfault_threads: 2").write(toFile: file, atomically: true, encoding: .utf8)
      let wrong = try faultline("serve", "--config", file)
      #expect(wrong.status == 1)
      #expect(wrong.errors.contains("config.yaml:7:1: ") && wrong.errors.contains("fault-threads"))
    }
  }

  @Test("Guests that are killed at any moment leave no descriptor, thread or memory behind")
  func killed() throws {
    let rounds = ProcessInfo.processInfo.environment["FAULTLINE_KILL_ROUNDS"].flatMap(Int.init)
    try withTemporaryDirectory { directory in
      let service = try Service(in: directory, ["--fill-rate", "20M"])
      var generator = SystemRandomNumberGenerator()
      func round(_ number: Int) throws {
        let guests = try (0..<2).map { _ in try FirecrackerProcess(service.socket) }
        Delay.microseconds(UInt32.random(in: 0..<30_000, using: &generator))
        for guest in guests { guest.kill() }
      }
      func settled() -> Bool { (try? service.sessions().isEmpty) == true }
      // Of a daemon that has served nobody yet, but an operator.
      #expect(settled())
      let before = (service.daemon.descriptorCount, service.daemon.count("task"))
      for number in 0..<10 { try round(number) }
      #expect(Delay.until { settled() })
      // Threads of sources and of ends go a second later.
      Delay.microseconds(1_500_000)
      let memory = service.daemon.anonymousKiB
      for number in 0..<(rounds ?? 50) / 2 { try round(number) }
      #expect(Delay.until { settled() })
      #expect(Delay.until { service.daemon.descriptorCount <= before.0 }, "descriptors stay")
      #expect(Delay.until { service.daemon.count("task") <= before.1 + 2 }, "threads stay")
      let growth = service.daemon.anonymousKiB - memory
      #expect(growth < 8192, "\(growth) KiB more than \(memory)")
      // And it serves as before.
      #expect(try FirecrackerProcess(service.socket).finish() == Self.right)
    }
  }
}
