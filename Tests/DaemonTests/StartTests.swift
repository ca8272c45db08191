// SPDX-License-Identifier: Apache-2.0

import Foundation
import TestSupport
import Testing

@Suite("Daemons on one path")
struct StartTests {
  @Test("Of some that start at once on a stale socket one serves, the others say who has it")
  func race() throws {
    try withTemporaryDirectory { directory in
      _ = try makePatternImage(directory + "/base.img", regions: imageRegions([512, 512]))
      let (socket, control) = (directory + "/vmm.sock", directory + "/control.sock")
      let arguments = [
        "--socket", socket, "--image", directory + "/base.img", "--control-socket", control,
      ]
      for round in 0..<20 {
        // In every other round only the control socket is the same.
        let daemons = try (0..<3).map { number in
          var own = arguments
          if round % 2 == 1 { own[1] = directory + "/vmm\(number).sock" }
          return try DaemonProcess(in: directory, own, waits: false)
        }
        #expect(
          Delay.until { daemons.allSatisfy { $0.logged("ready") || !$0.isRunning } })
        let winners = daemons.filter { $0.isRunning }
        try #require(winners.count == 1, "\(daemons.map(\.messages))")
        for daemon in daemons where !daemon.isRunning {
          #expect(daemon.wait() == 1)
          #expect(daemon.logged("another daemon answers there"), "\(daemon.messages)")
        }
        let health = try faultline("ps", "--control-socket", control)
        #expect(health.status == 0, "\(health)")
        if round % 2 == 0 {
          #expect(try FirecrackerProcess(socket).finish() == ServeTests.right)
        }
        // What it leaves behind is for the next round to replace.
        winners[0].send(SIGKILL)
        _ = winners[0].wait()
      }
      let last = try DaemonProcess(in: directory, arguments)
      last.send(SIGTERM)
      #expect(last.wait() == 0)
      let left = try FileManager.default.contentsOfDirectory(atPath: directory)
      #expect(!left.contains { $0.hasPrefix("vmm.sock") || $0.hasPrefix("control.sock") })
    }
  }
}
