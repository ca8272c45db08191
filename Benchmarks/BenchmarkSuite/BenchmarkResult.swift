// SPDX-License-Identifier: Apache-2.0

/// One line of a benchmark's answer, in the form that all benchmarks share.
public struct BenchmarkResult: Encodable, Sendable {
  /// The name in SPECIFICATION.md.
  public let name: String
  /// The unit of `ours` and `peer`.
  public let unit: String
  /// Our median over the rounds.
  public let ours: Double
  /// The peer's median; `nil` where the goal is an absolute figure.
  public let peer: Double?
  /// ours/peer.
  public let ratio: Double?
  /// The promise: a comparison with the ratio, or where there is no peer with `ours`; `nil`
  /// for a figure that is only reported.
  public let goal: String?
  /// Whether the promise was kept in this run; `nil` where there is none.
  public let met: Bool?
  /// Rounds that were measured.
  public let rounds: Int
  /// The spread of our rounds, (max − min) / median.
  public let spread: Double

  /// What a figure is held against: the ratio to the peer, or where there is none our median.
  enum Limit {
    case atMost(Double)
    case atLeast(Double)
    /// Nothing: it is reported.
    case none
  }

  /// Compares medians; the goal is at most `limit` times the peer, or at most `limit`.
  init(name: String, unit: String, ours: [Double], peer: [Double]?, limit: Double) {
    self.init(name: name, unit: unit, ours: ours, peer: peer, .atMost(limit))
  }

  /// Compares medians with a limit.
  init(name: String, unit: String, ours: [Double], peer: [Double]? = nil, _ limit: Limit) {
    let middle = median(ours)
    let peerMiddle = peer.map(median)
    let ratio = peerMiddle.map { middle / $0 }
    self.name = name
    self.unit = unit
    self.ours = middle
    self.peer = peerMiddle
    self.ratio = ratio
    let unitOfGoal = peer == nil ? " \(unit)" : ""
    switch limit {
    case .atMost(let limit):
      goal = "<=\(shortest(limit))" + unitOfGoal
      met = (ratio ?? middle) <= limit
    case .atLeast(let limit):
      goal = ">=\(shortest(limit))" + unitOfGoal
      met = (ratio ?? middle) >= limit
    case .none:
      goal = nil
      met = nil
    }
    rounds = ours.count
    spread = ((ours.max() ?? 0) - (ours.min() ?? 0)) / max(middle, .leastNonzeroMagnitude)
  }

  private enum CodingKeys: CodingKey {
    case name, unit, ours, peer, ratio, goal, met, rounds, spread
  }

  /// Encodes absent values as null: every line has the same keys.
  public func encode(to encoder: any Encoder) throws {
    var container = encoder.container(keyedBy: CodingKeys.self)
    try container.encode(name, forKey: .name)
    try container.encode(unit, forKey: .unit)
    try container.encode(ours, forKey: .ours)
    try container.encode(peer, forKey: .peer)
    try container.encode(ratio, forKey: .ratio)
    try container.encode(goal, forKey: .goal)
    try container.encode(met, forKey: .met)
    try container.encode(rounds, forKey: .rounds)
    try container.encode(spread, forKey: .spread)
  }

  // MARK: - For people

  /// The heading over `line`.
  public static let heading =
    pad("benchmark", 38) + pad("ours", 14) + pad("peer", 14) + pad("ratio", 8) + pad("goal", 12)
    + pad("spread", 8) + "met"

  /// One aligned line.
  public var line: String {
    pad(name, 38) + pad("\(rounded(ours)) \(unit)", 14)
      + pad(peer.map { "\(rounded($0)) \(unit)" } ?? "-", 14)
      + pad(ratio.map { rounded($0) } ?? "-", 8) + pad(goal ?? "-", 12)
      + pad("±\(Int(spread * 50)) %", 8) + (met.map { $0 ? "yes" : "NO" } ?? "-")
  }
}

/// The middle of the values; 0 for none.
func median(_ values: [Double]) -> Double {
  let sorted = values.sorted()
  guard !sorted.isEmpty else { return 0 }
  let middle = sorted.count / 2
  return sorted.count % 2 == 1 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2
}

private func rounded(_ value: Double) -> String {
  shortest((value * 100).rounded() / 100)
}

private func shortest(_ value: Double) -> String {
  value == value.rounded() ? "\(Int(value))" : "\(value)"
}

private func pad(_ text: String, _ width: Int) -> String {
  text + String(repeating: " ", count: max(1, width - text.count))
}
