// SPDX-License-Identifier: Apache-2.0

import Foundation
import Pager
import TestSupport
import Testing

@Suite("The serving path does not allocate")
struct AllocationTests {
  /// In a process of its own, whose malloc counts.
  @Test(
    "Thousands of faults from an image take no allocation", arguments: ResolutionMode.allCases,
    [
      [1, 0, 0, 64], [2, 0, 0, 64], [1, 1, 0, 64], [2, 1, 0, 64], [1, 0, 1 << 20, 64],
      [1, 1, 1 << 20, 64], [1, 0, 0, 1], [2, 1, 0, 1],
    ])
  func noAllocation(mode: ResolutionMode, how: [Int]) throws {
    try withTemporaryDirectory { directory in
      let process = Process()
      process.executableURL = builtProduct("allocation-probe")
      // Threads, level of compression, fault-around in bytes, pages of the index in memory:
      // with one (it makes four) most faults read one from the file.
      process.arguments = [mode.rawValue] + how.map { "\($0)" } + [directory + "/image"]
      let output = Pipe()
      process.standardOutput = output
      try process.run()
      let data = output.fileHandleForReading.readDataToEndOfFile()
      process.waitUntilExit()
      let text = String(decoding: data, as: UTF8.self)
      let words = text.split(separator: "\n").joined().split(separator: " ")
      try #require(words.count == 3, "\(text)")
      #expect(words[1...] == ["allocations=0", "right=true"])
      // With a compressed image or fault-around pages come along.
      let faults = try #require(Int(words[0].dropFirst("faults=".count)))
      if how[1...2] == [0, 0] {
        #expect(faults == 4096)
      } else {
        #expect(faults > 100 || how[2] > 0)
      }
    }
  }
}
