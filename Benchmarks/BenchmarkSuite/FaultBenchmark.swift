// SPDX-License-Identifier: Apache-2.0

import GuestMemory
import LinuxSystem
import MemoryImage
import Pager
import SnapshotRestore
import SystemPackage
import TestGuest

/// The latency of one 4 KiB fault as the guest sees it, against a minimal handler in C,
/// and the time from an image to the guest's first instruction for two sizes.
///
/// Both sides run the same guest, restored from the same bytes, touching the same pages
/// in the same random order; only the handler differs. They take turns.
public struct FaultBenchmark {
  let rounds: Int

  /// A benchmark of so many rounds, after one that is not counted.
  public init(rounds: Int) { self.rounds = rounds }

  /// Runs everything and reports each result when it is there.
  public func run(_ report: (BenchmarkResult) throws -> Void) throws {
    let kinds: [TestGuest.Kind] = TestGuest.kvmIsAvailable() ? [.process, .kvm] : [.process]
    for kind in kinds {
      let fixture = try FaultFixture(kind: kind)
      defer { fixture.remove() }
      for mode in ResolutionMode.allCases {
        for pace in FaultPace.allCases {
          for result in try compare(fixture, mode, pace) { try report(result) }
        }
      }
    }
    for kind in kinds {
      for result in try RestoreScaling(kind: kind, rounds: rounds).results() { try report(result) }
    }
  }

  private func compare(
    _ fixture: FaultFixture, _ mode: ResolutionMode, _ pace: FaultPace
  ) throws -> [BenchmarkResult] {
    var ours: [TouchTimes] = []
    var peer: [TouchTimes] = []
    for round in 0...rounds {
      let (first, second): (TouchTimes, TouchTimes)
      if round % 2 == 0 {
        first = try fixture.touchOurs(mode, pace)
        second = try fixture.touchPeer(mode, pace)
      } else {
        second = try fixture.touchPeer(mode, pace)
        first = try fixture.touchOurs(mode, pace)
      }
      // The first round warms caches up.
      guard round > 0 else { continue }
      ours.append(first)
      peer.append(second)
    }
    let name = "fault.\(fixture.kind == .kvm ? "kvm" : "process").\(mode.rawValue).\(pace.rawValue)"
    return [
      BenchmarkResult(
        name: "\(name).p50", unit: "µs", ours: ours.map(\.p50), peer: peer.map(\.p50),
        limit: 1.05),
      BenchmarkResult(
        name: "\(name).p99", unit: "µs", ours: ours.map(\.p99), peer: peer.map(\.p99),
        limit: 1.2),
    ]
  }
}

/// How fast faults follow each other.
enum FaultPace: String, CaseIterable {
  /// One right after the other: 7936 pages.
  case stream
  /// After 0.4 ms without one, when every handler sleeps: 400 pages.
  case isolated

  var options: WorkloadOptions {
    switch self {
    case .stream: WorkloadOptions()
    case .isolated: WorkloadOptions(pages: 1024..<1424, batch: 1, interval: 400_000)
    }
  }
}

/// Quantiles of the touches of one round, in microseconds.
struct TouchTimes {
  let p50: Double
  let p99: Double

  init(samples: [UInt32], ticksPerMicrosecond: Double) {
    let sorted = samples.sorted()
    guard !sorted.isEmpty else {
      (p50, p99) = (0, 0)
      return
    }
    p50 = Double(sorted[sorted.count / 2]) / ticksPerMicrosecond
    p99 = Double(sorted[sorted.count * 99 / 100]) / ticksPerMicrosecond
  }
}
