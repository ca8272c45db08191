// SPDX-License-Identifier: Apache-2.0

import Foundation
import GuestMemory
import LinuxSystem
import Snapshot
import SnapshotRestore
import SystemPackage
import TestGuest

/// Time from opening an image to the guest's first instruction: 16 GiB against 1 GiB.
struct RestoreScaling {
  let kind: TestGuest.Kind
  let rounds: Int

  func results() throws -> [BenchmarkResult] {
    let small = try makeImage(1 << 30)
    defer { try? removeFile(small) }
    let large = try makeImage(16 << 30)
    defer { try? removeFile(large) }
    var smallTimes: [Double] = []
    var largeTimes: [Double] = []
    for round in 0...rounds {
      let first = try timeToFirstInstruction(small)
      let second = try timeToFirstInstruction(large)
      guard round > 0 else { continue }
      smallTimes.append(first)
      largeTimes.append(second)
    }
    let name = "restore.\(kind == .kvm ? "kvm" : "process").first-instruction"
    return [
      BenchmarkResult(
        name: "\(name).16G-to-1G", unit: "ms", ours: largeTimes, peer: smallTimes, limit: 1.5),
      BenchmarkResult(name: "\(name).16G", unit: "ms", ours: largeTimes, peer: nil, limit: 20),
    ]
  }

  private func timeToFirstInstruction(_ image: FilePath) throws -> Double {
    let restored = try RestoredGuest(image)
    defer { restored.shutdown() }
    return Double(try restored.timeToFirstInstruction()) / 1e6
  }

  /// A sparse guest: 64 MiB of content in memory of the given size.
  private func makeImage(_ length: Int) throws -> FilePath {
    let path = temporaryImage("restore-\(length >> 30)G")
    let memory = GuestMemoryHandle(
      try GuestMemoryObject(backing: .anonymous, length: length))
    let guest = try TestGuest(booting: memory.range, kind: kind)
    defer { guest.shutdown() }
    _ = try guest.run(.fill(seed: 1), WorkloadOptions(pages: 256..<(256 + 16384)))
    _ = try Snapshotter(TestGuestSnapshots(guest, memory)).take(to: path, leavesPaused: true)
    return path
  }
}

/// A path for an image of a benchmark, which removes it when it is done.
func temporaryImage(_ name: String) -> FilePath {
  let directory = FileManager.default.temporaryDirectory.path
  return FilePath("\(directory)/faultline-bench-\(name)-\(UUID().uuidString).img")
}

/// Removes a file.
func removeFile(_ path: FilePath) throws {
  try FileManager.default.removeItem(atPath: path.string)
}
