// SPDX-License-Identifier: Apache-2.0

import ArgumentParser
import BenchmarkSuite

/// Runs a benchmark of SPECIFICATION.md.
struct BenchCommand: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "bench",
    abstract: "Measure what SPECIFICATION.md promises, against a peer in the same run.",
    discussion: """
      Ours and the peer take turns, round by round; medians are compared. With --json one
      object a line: name, unit, ours, peer, ratio (ours/peer), goal, met, rounds, spread.

      faultline bench fault                 latency of one fault, and restores of two sizes
      faultline bench fault --rounds 15 --json

      Exit status: 0 all goals met; 1 one was missed.
      """)

  enum Name: String, ExpressibleByArgument, CaseIterable { case fault }

  @Argument(help: "Which benchmark: fault.")
  var name: Name
  @Option(help: "Rounds of each measurement.")
  var rounds = 11
  @Flag(help: "Print one JSON object a line.")
  var json = false

  func validate() throws {
    guard (1...1000).contains(rounds) else { throw ValidationError("--rounds must be 1 to 1000") }
  }

  func run() throws {
    var allMet = true
    if !json { print(BenchmarkResult.heading) }
    try FaultBenchmark(rounds: rounds).run { result in
      allMet = allMet && result.met
      if json { try Terminal.printJSON(result) } else { print(result.line) }
    }
    if !allMet { throw ExitCode(1) }
  }
}
