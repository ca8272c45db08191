// SPDX-License-Identifier: Apache-2.0

import ArgumentParser
import BenchmarkSuite
import Foundation

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
      faultline bench image                 images against zstd
      faultline bench pager                 fault-around, working sets, clones, the daemon
      faultline bench snapshot              snapshots of a running guest
      faultline bench hostile               guests that misbehave, and an honest one beside them
      faultline bench hostile --only soak --operations 1000000

      Exit status: 0 all goals met; 1 one was missed.
      """)

  enum Name: String, ExpressibleByArgument, CaseIterable {
    case fault, image, snapshot, pager, hostile
  }

  @Argument(help: "Which benchmark: fault, image, pager, snapshot or hostile.")
  var name: Name
  @Option(help: "Rounds of each measurement. (default: 11 of fault, 3 of hostile, 5 of the others)")
  var rounds: Int?
  @Option(
    help: "With pager or hostile: only what has this in its name, such as replay, serve or storm.")
  var only = ""
  @Option(help: "With hostile: random operations on each kind of memory. (default: 100000)")
  var operations: Int?
  @Flag(help: "Print one JSON object a line.")
  var json = false

  func validate() throws {
    guard only.isEmpty || name == .pager || name == .hostile else {
      throw ValidationError("--only goes with `bench pager` and `bench hostile`")
    }
    guard operations == nil || name == .hostile else {
      throw ValidationError("--operations goes with `bench hostile`")
    }
    guard (1...1_000_000_000).contains(operations ?? 1) else {
      throw ValidationError("--operations must be 1 to 1000000000")
    }
    guard (1...1000).contains(rounds ?? 1) else {
      throw ValidationError("--rounds must be 1 to 1000")
    }
  }

  func run() throws {
    var allMet = true
    if !json { print(BenchmarkResult.heading) }
    let report = { (result: BenchmarkResult) in
      allMet = allMet && result.met != false
      if json { try Terminal.printJSON(result) } else { print(result.line) }
      fflush(nil)
    }
    switch name {
    case .fault: try FaultBenchmark(rounds: rounds ?? 11).run(report)
    case .image: try ImageBenchmark(rounds: rounds ?? 5).run(report)
    case .pager: try PagerBenchmark(rounds: rounds ?? 5, only: only).run(report)
    case .snapshot: try SnapshotBenchmark(rounds: rounds ?? 5).run(report)
    case .hostile:
      let command = URL(fileURLWithPath: "/proc/self/exe").resolvingSymlinksInPath()
      try HostileBenchmark(
        rounds: rounds ?? 3, only: only, operations: operations ?? 100_000, command: command
      ).run(report) { Terminal.note($0) }
    }
    if !allMet { throw ExitCode(1) }
  }
}
