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
    [1, 2])
  func noAllocation(mode: ResolutionMode, threads: Int) throws {
    try withTemporaryDirectory { directory in
      let process = Process()
      process.executableURL = builtProduct("allocation-probe")
      process.arguments = [mode.rawValue, "\(threads)", directory + "/image"]
      let output = Pipe()
      process.standardOutput = output
      try process.run()
      let data = output.fileHandleForReading.readDataToEndOfFile()
      process.waitUntilExit()
      let text = String(decoding: data, as: UTF8.self)
      #expect(text == "faults=4096 allocations=0 right=true\n")
    }
  }
}
