// SPDX-License-Identifier: Apache-2.0

public import Foundation
import HostileGuests

/// An honest guest beside hostile ones, and beside plain processes that do the same unserved.
public struct HostileBenchmark {
  let rounds: Int
  let only: String
  let operations: Int
  let command: URL

  /// A benchmark of so many rounds of each scenario.
  ///
  /// - Parameters:
  ///   - only: measures what has this in its name.
  ///   - operations: of the random ones, on each kind of memory.
  ///   - command: the executable `faultline`, of which all guests are made.
  public init(rounds: Int, only: String = "", operations: Int, command: URL) {
    self.rounds = rounds
    self.only = only
    self.operations = operations
    self.command = command
  }

  /// Runs everything and reports each result when it is there.
  ///
  /// - Parameter explain: gets what went wrong, in words.
  public func run(
    _ report: (BenchmarkResult) throws -> Void, explain: (String) -> Void
  ) throws {
    // One that is refused does nothing that could be measured.
    for scenario in HostileScenario.all
    where !scenario.isRefused && isWanted("hostile." + scenario.name) {
      for result in try compare(scenario, explain) { try report(result) }
    }
    for memory in HostileSoak.Memory.allCases where isWanted("hostile.soak." + memory.rawValue) {
      let (guest, violations) = try HostileSoak(
        memory, operations: operations, command: command
      ).run()
      for violation in violations { explain("hostile.soak.\(memory.rawValue): \(violation)") }
      // One that was not let begin has shown nothing.
      let wrong = guest["touches"] > 0 ? guest["wrong"] + guest["errors"] : Double(operations)
      try report(
        BenchmarkResult(
          name: "hostile.soak.\(memory.rawValue).wrong-pages", unit: "pages", ours: [wrong],
          .atMost(0)))
    }
  }

  private func isWanted(_ name: String) -> Bool { only.isEmpty || name.contains(only) }

  /// Takes turns with the plain processes.
  private func compare(
    _ scenario: HostileScenario, _ explain: (String) -> Void
  ) throws -> [BenchmarkResult] {
    let round = HostileRound(scenario, seconds: 2, command: command)
    var tails: (ours: [Double], peer: [Double]) = ([], [])
    var handovers: (ours: [Double], peer: [Double]) = ([], [])
    var wrong: [Double] = []
    var broken: [Double] = []
    for _ in 0..<rounds {
      let plain = try round.besidePlainLoad()
      let served = try round.served()
      tails.peer.append(plain.honest["p99-us"])
      tails.ours.append(served.honest["p99-us"])
      handovers.peer.append(plain.honest["handover-us"])
      handovers.ours.append(served.honest["handover-us"])
      wrong.append(
        max(0, served.honest["wrong"]) + served.hostile.reduce(0) { $0 + max(0, $1["wrong"]) })
      broken.append(Double(served.violations.count))
      for violation in served.violations { explain("hostile.\(scenario.name): \(violation)") }
    }
    let name = "hostile." + scenario.name
    return [
      BenchmarkResult(
        name: name + ".honest-p99", unit: "us", ours: tails.ours, peer: tails.peer, .atMost(5)),
      BenchmarkResult(
        name: name + ".honest-handover", unit: "us", ours: handovers.ours, peer: handovers.peer,
        .atMost(5)),
      BenchmarkResult(
        name: name + ".wrong-pages", unit: "pages", ours: [wrong.reduce(0, +)], .atMost(0)),
      BenchmarkResult(
        name: name + ".broken-bounds", unit: "bounds", ours: [broken.reduce(0, +)], .atMost(0)),
    ]
  }
}
