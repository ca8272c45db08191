// SPDX-License-Identifier: Apache-2.0

import Foundation
import LinuxSystem
import MemoryImage
import SystemPackage

/// Images of real memory against zstd on the same bytes.
///
/// The memory is what this machine's programs are made of: the text and data of its largest
/// libraries and programs, each piece once, so that what zstd finds is in it and what equal
/// pages would give is not.
public struct ImageBenchmark {
  let rounds: Int

  /// A benchmark of so many rounds, after one that is not counted.
  public init(rounds: Int) { self.rounds = rounds }

  /// Runs everything and reports each result when it is there.
  public func run(_ report: (BenchmarkResult) throws -> Void) throws {
    let fixture = try ImageFixture(length: 1 << 30)
    defer { fixture.remove() }
    for result in try creation(fixture) { try report(result) }
    try report(try singlePages(fixture))
    try report(try wholeImage(fixture))
    for result in try opening() { try report(result) }
  }

  // MARK: - Creation

  private func creation(_ fixture: ImageFixture) throws -> [BenchmarkResult] {
    var ours: [Double] = []
    var peer: [Double] = []
    for round in 0...rounds {
      var times = (0.0, 0.0)
      let measureOurs = { times.0 = try seconds { try fixture.createImage() } }
      let measurePeer = { times.1 = try seconds { try fixture.runZstd() } }
      if round % 2 == 0 {
        try measureOurs()
        try measurePeer()
      } else {
        try measurePeer()
        try measureOurs()
      }
      guard round > 0 else { continue }
      ours.append(1024 / times.0)
      peer.append(1024 / times.1)
    }
    let sizes = try (fileLength(fixture.image), fileLength(fixture.compressed))
    return [
      BenchmarkResult(
        name: "image.create.rate", unit: "MiB/s", ours: ours, peer: peer, .atLeast(0.9)),
      BenchmarkResult(
        name: "image.create.size", unit: "MiB", ours: [Double(sizes.0) / 1_048_576],
        peer: [Double(sizes.1) / 1_048_576], .atMost(1.08)),
    ]
  }

  // MARK: - Reading

  /// One page after the other in a random order, from a file in the page cache.
  private func singlePages(_ fixture: ImageFixture) throws -> BenchmarkResult {
    let image = try MemoryImage(path: fixture.image)
    let room = try Mapping(anonymous: 4096)
    let blocks = fixture.length / 4096
    var random = SystemRandomNumberGenerator()
    var medians: [Double] = []
    for round in 0...rounds {
      var times: [Double] = []
      while times.count < 4000 {
        let block = Int.random(in: 0..<blocks, using: &random)
        let start = MonotonicClock.nanoseconds
        // SAFETY: the room is one block.
        let read = try unsafe image.read(
          region: 0, firstBlock: block, blockCount: 1, into: room.pointer)
        let time = Double(MonotonicClock.nanoseconds - start) / 1000
        if read.kind == .data { times.append(time) }
      }
      if round > 0 { medians.append(median(times)) }
    }
    return BenchmarkResult(
      name: "image.read.random-page", unit: "µs", ours: medians, .atMost(50))
  }

  /// All of it with all cores, checked, against libzstd on the same chunks in memory.
  private func wholeImage(_ fixture: ImageFixture) throws -> BenchmarkResult {
    let image = try MemoryImage(path: fixture.image)
    let decoder = try ChunkDecodePeer(fixture)
    var ours: [Double] = []
    var peer: [Double] = []
    for round in 0...rounds {
      let mine = try seconds { try fixture.readAll(image) }
      let theirs = try seconds { try decoder.run() }
      guard round > 0 else { continue }
      ours.append(1024 / mine)
      peer.append(1024 / theirs)
    }
    return BenchmarkResult(
      name: "image.read.all", unit: "MiB/s", ours: ours, peer: peer, .atLeast(0.9))
  }

  // MARK: - Opening

  /// Opening an image and reading its last page: sparse guests of 1 and 64 GiB.
  private func opening() throws -> [BenchmarkResult] {
    let small = try SparseImage(length: 1 << 30)
    defer { small.remove() }
    let large = try SparseImage(length: 64 << 30)
    defer { large.remove() }
    var times: (small: [Double], large: [Double]) = ([], [])
    for round in 0...max(rounds * 4, 20) {
      let first = try seconds { try small.openAndRead() } * 1000
      let second = try seconds { try large.openAndRead() } * 1000
      guard round > 0 else { continue }
      times.small.append(first)
      times.large.append(second)
    }
    return [
      BenchmarkResult(name: "image.open.64G", unit: "ms", ours: times.large, .atMost(2)),
      BenchmarkResult(
        name: "image.open.64G-to-1G", unit: "ms", ours: times.large, peer: times.small,
        .atMost(1.5)),
    ]
  }
}

/// How long a body takes.
func seconds(_ body: () throws -> Void) rethrows -> Double {
  let start = MonotonicClock.nanoseconds
  try body()
  return Double(MonotonicClock.nanoseconds - start) / 1e9
}

/// Bytes of a file.
func fileLength(_ path: FilePath) throws -> Int {
  try OwnedDescriptor(openingForReading: path).status.length
}
