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
      // Threads, level of compression, fault-around in bytes, pages of the index in memory:
      // with one (it makes four) most faults read one from the file.
      let arguments = [mode.rawValue] + how.map { "\($0)" } + [directory + "/image"]
      var words: [Substring] = []
      // Where the kernel moves pages of the page cache just then (it makes huge pages for
      // somebody), a block is not at hand, and a thread that may wait for it is made.
      for _ in 0..<5 where words.first != "deferred=0" {
        words = try probe(arguments).split(separator: "\n").joined().split(separator: " ")
      }
      try #require(words.count == 4 && words.removeFirst() == "deferred=0", "\(words)")
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

  @Test("Nor do those of a clone whose cache takes room from another one", arguments: [1, 2])
  func noAllocationOfClones(threads: Int) throws {
    try withTemporaryDirectory { directory in
      let arguments = ["clone", "\(threads)", "0", "0", "64", directory + "/image"]
      var words: [Substring] = []
      for _ in 0..<5 where words.first != "deferred=0" {
        words = try probe(arguments).split(separator: "\n").joined().split(separator: " ")
      }
      #expect(words == ["deferred=0", "faults=4096", "allocations=0", "right=true"], "\(words)")
    }
  }

  private func probe(_ arguments: [String]) throws -> String {
    let process = Process()
    process.executableURL = builtProduct("allocation-probe")
    process.arguments = arguments
    let output = Pipe()
    process.standardOutput = output
    try launch(process)
    let data = output.fileHandleForReading.readDataToEndOfFile()
    process.waitUntilExit()
    return String(decoding: data, as: UTF8.self)
  }
}
