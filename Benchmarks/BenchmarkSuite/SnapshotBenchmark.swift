// SPDX-License-Identifier: Apache-2.0

import Foundation
import GuestMemory
import LinuxSystem
import MemoryImage
import Snapshot
import SnapshotRestore
import SystemPackage
import TestGuest

/// Snapshots of a running guest: how long it stands still, how fast it writes meanwhile, and
/// what an increment costs.
public struct SnapshotBenchmark {
  private static let batch = 256
  let rounds: Int
  private let kind: TestGuest.Kind = TestGuest.kvmIsAvailable() ? .kvm : .process

  /// A benchmark of so many rounds.
  public init(rounds: Int) { self.rounds = rounds }

  /// Runs everything and reports each result when it is there.
  public func run(_ report: (BenchmarkResult) throws -> Void) throws {
    for result in try live() { try report(result) }
    for result in try incremental() { try report(result) }
  }

  // MARK: - Live

  /// A guest of 1 GiB that writes as fast as it can. Each image is restored, and the guest
  /// verifies it; a wrong page ends the benchmark.
  private func live() throws -> [BenchmarkResult] {
    let memory = GuestMemoryHandle(
      try GuestMemoryObject(backing: .anonymous, length: 1 << 30))
    let guest = try TestGuest(booting: memory.range, kind: kind)
    defer { guest.shutdown() }
    _ = try guest.run(.fill(seed: 1))
    try guest.start(.dirty(seed: 1), WorkloadOptions(batch: Self.batch))
    let snapshotter = Snapshotter(TestGuestSnapshots(guest, memory))
    var pauses: [Double] = []
    var before: [Double] = []
    var during: [Double] = []
    for _ in 0..<rounds {
      let path = temporaryImage("live")
      defer { try? removeFile(path) }
      before.append(pagesPerSecond(guest) { Thread.sleep(forTimeInterval: 0.3) })
      var report = SnapshotReport()
      during.append(
        try pagesPerSecond(guest) { report = try snapshotter.takeLive(to: path) })
      pauses.append(Double(report.pause.total) / 1e6)
      try Self.verify(path)
    }
    let name = kind == .kvm ? "kvm" : "process"
    return [
      BenchmarkResult(
        name: "snapshot.\(name).live.pause", unit: "ms", ours: pauses, .atMost(10)),
      BenchmarkResult(
        name: "snapshot.\(name).live.longest-pause", unit: "ms", ours: [pauses.max() ?? 0],
        .atMost(10)),
      BenchmarkResult(
        name: "snapshot.\(name).live.write-rate", unit: "pages/s", ours: during, peer: before,
        .none),
    ]
  }

  private func pagesPerSecond(
    _ guest: TestGuest, during body: () throws -> Void
  ) rethrows -> Double {
    let (start, batches) = (MonotonicClock.nanoseconds, guest.batches)
    try body()
    let seconds = Double(MonotonicClock.nanoseconds - start) / 1e9
    return Double(guest.batches - batches) * Double(Self.batch) / seconds
  }

  private static func verify(_ path: FilePath) throws {
    let restored = try RestoredGuest(path)
    defer { restored.shutdown() }
    restored.guest.stop()
    let dirtied = try restored.guest.wait().dirtied
    let report = try restored.guest.run(.verify(seed: 1, dirtied: dirtied))
    guard report.pages > 0, report.wrongPages == 0 else {
      throw BenchmarkFailure("The live snapshot has \(report.wrongPages) wrong pages")
    }
  }

  // MARK: - Incremental

  /// A guest of 4 GiB of which 1 % is written between two images: 256 runs of pages, spread
  /// over all of memory.
  private func incremental() throws -> [BenchmarkResult] {
    let length = 4 << 30
    let memory = GuestMemoryHandle(
      try GuestMemoryObject(backing: .anonymous, length: length))
    let guest = try TestGuest(booting: memory.range, kind: kind)
    defer { guest.shutdown() }
    _ = try guest.run(.fill(seed: 1))
    let tracking = try guest.makeDirtyTracking(backing: .anonymous)
    let snapshotter = Snapshotter(TestGuestSnapshots(guest, memory), tracking: tracking)
    var full: [Double] = []
    var increments: [Double] = []
    var pages: [Double] = []
    for round in 0..<max(2, rounds / 2) {
      let base = temporaryImage("base")
      let child = temporaryImage("increment")
      defer {
        try? removeFile(base)
        try? removeFile(child)
      }
      full.append(Double(try snapshotter.take(to: base).duration) / 1e6)
      let count = length / 4096
      for run in 0..<256 {
        let first = 256 + run * (count - 512) / 256
        _ = try guest.run(
          .dirty(seed: UInt64(round + 2), generations: 1),
          WorkloadOptions(pages: first..<first + count / 25600))
      }
      let report = try snapshotter.take(to: child, SnapshotOptions(.incremental))
      increments.append(Double(report.duration) / 1e6)
      pages.append(Double(report.pages))
    }
    return [
      BenchmarkResult(
        name: "snapshot.incremental.1-percent-of-4G", unit: "ms", ours: increments, peer: full,
        .atMost(0.05)),
      BenchmarkResult(
        name: "snapshot.incremental.pages", unit: "pages", ours: pages, .none),
    ]
  }
}

/// Why a benchmark has no result.
struct BenchmarkFailure: Error, CustomStringConvertible {
  let description: String
  init(_ description: String) { self.description = description }
}
