// SPDX-License-Identifier: Apache-2.0

import Foundation

/// Random numbers that a seed repeats: splitmix64 (Steele, Lea, Flood 2014).
package struct SeededRandom: RandomNumberGenerator, Sendable {
  private var state: UInt64

  package init(seed: UInt64) { state = seed }

  package mutating func next() -> UInt64 {
    state &+= 0x9E37_79B9_7F4A_7C15
    var mixed = state
    mixed = (mixed ^ mixed >> 30) &* 0xBF58_476D_1CE4_E5B9
    mixed = (mixed ^ mixed >> 27) &* 0x94D0_49BB_1331_11EB
    return mixed ^ mixed >> 31
  }

  /// 0 up to, not including, a limit.
  package mutating func below(_ limit: Int) -> Int { Int(next() % UInt64(limit)) }

  /// Pages within some, at least one and at most so many.
  package mutating func part(of pages: Range<Int>, atMost limit: Int) -> Range<Int> {
    let first = pages.lowerBound + below(pages.count)
    return first..<min(pages.upperBound, first + 1 + below(limit))
  }
}

/// A number that an environment variable sets, such as how often a test repeats itself.
package func testSetting(_ variable: String, usual: Int) -> Int {
  ProcessInfo.processInfo.environment[variable].flatMap { Int($0) } ?? usual
}
