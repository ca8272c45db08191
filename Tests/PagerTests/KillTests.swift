// SPDX-License-Identifier: Apache-2.0

import Foundation
import TestSupport
import Testing

@Suite("Guests that are killed")
struct KillTests {
  /// In a process of its own, where nobody else opens or starts anything. A thousand of them:
  /// FAULTLINE_KILL_ROUNDS=1000 swift test --filter KillTests
  @Test("kill -9 at random moments leaves no descriptor, thread, child or memory behind")
  func leaveNothing() throws {
    let rounds = testSetting("FAULTLINE_KILL_ROUNDS", usual: 50)
    let seed = testSetting("FAULTLINE_KILL_SEED", usual: 1)
    let process = Process()
    process.executableURL = builtProduct("kill-probe")
    process.arguments = ["\(rounds)", "\(seed)"]
    let output = Pipe()
    process.standardOutput = output
    try launch(process)
    let data = output.fileHandleForReading.readDataToEndOfFile()
    process.waitUntilExit()
    let text = String(decoding: data, as: UTF8.self)
    print("kill-probe, seed \(seed): \(text)", terminator: "")
    var found: [Substring: Int] = [:]
    for word in text.split(whereSeparator: \.isWhitespace) {
      let parts = word.split(separator: "=")
      if parts.count == 2, let value = Int(parts[1]) { found[parts[0]] = value }
    }
    #expect(process.terminationStatus == 0)
    #expect(found["rounds"] == rounds, "\(text)")
    #expect(found["problems"] == 0, "seed \(seed): \(text)")
    for leak in ["descriptors", "threads", "children"] {
      #expect(try #require(found[Substring(leak)]) <= 0, "seed \(seed): \(text)")
    }
    #expect(found["sessions"] == 0)
    // The bench of one thread of one round would be 12 MiB in 50 rounds.
    #expect(try #require(found["resident-kib"]) < 8192, "seed \(seed): \(text)")
  }
}
