// SPDX-License-Identifier: Apache-2.0

import CMinimalHandler
import GuestMemory
import LinuxSystem
import MemoryImage
import Pager
import Snapshot
import SnapshotRestore
import Synchronization
import SystemPackage
import TestGuest
import Userfault

/// The pager at work on a guest of 1 GiB: fault-around, working sets, and filling in bulk.
public struct PagerBenchmark {
  let rounds: Int
  let only: String

  /// A benchmark of so many rounds, after one that is not counted.
  ///
  /// - Parameter only: measures what has this in its name.
  public init(rounds: Int, only: String = "") {
    self.rounds = rounds
    self.only = only
  }

  /// Runs everything and reports each result when it is there.
  public func run(_ report: (BenchmarkResult) throws -> Void) throws {
    if isWanted("pager.clone") {
      let clones = CloneBenchmark(length: 1 << 30, rounds: rounds)
      for result in try clones.results() { try report(result) }
    }
    guard only.isEmpty || !only.contains("clone") else { return }
    let fixture = try PagerFixture(length: 1 << 30)
    defer { fixture.remove() }
    if isWanted("pager.sequential") {
      try report(
        try compare(fixture, "pager.\(fixture.name).sequential", .atLeast(8)) {
          try fixture.touch(fixture.stored, .sequential)
        } peer: {
          try fixture.touchPeer(.sequential)
        })
    }
    if isWanted("pager.random-recorded") {
      try fixture.record(.random)
      try report(
        try compare(fixture, "pager.\(fixture.name).random-recorded", .atLeast(10)) {
          try fixture.touch(fixture.stored, .random)
        } peer: {
          try fixture.touchPeer(.random)
        })
    }
    if isWanted("pager.replay.stored") {
      let peers = try BulkPeers(try MemoryImage(path: fixture.stored))
      try report(
        try compare(fixture, "pager.replay.stored", .atLeast(0.9)) {
          try fixture.replay(fixture.stored)
        } peer: {
          try fixture.copyRaw()
        })
      try report(
        try compare(
          fixture, "pager.replay.stored.floor", .none,
          blocks: (ours: peers.blocks, peer: fixture.length / 4096)
        ) {
          try fixture.fill(peers)
        } peer: {
          try fixture.copyRaw()
        })
    }
    if isWanted("pager.replay.compressed") {
      let peers = try BulkPeers(try MemoryImage(path: fixture.compressed))
      // What libzstd does not decode, zeros and equal blocks, does not count for it; where
      // `in-time` has it, all pages count for both.
      let decoded = (ours: fixture.length / 4096, peer: peers.blocks)
      for (suffix, limit, blocks) in [
        ("", BenchmarkResult.Limit.atLeast(0.9), decoded), (".in-time", .none, nil),
      ] {
        try report(
          try compare(fixture, "pager.replay.compressed" + suffix, limit, blocks: blocks) {
            try fixture.replay(fixture.compressed)
          } peer: {
            try seconds { try peers.decode() }
          })
      }
      try report(
        try compare(
          fixture, "pager.replay.compressed.floor", .none,
          blocks: (ours: peers.blocks, peer: peers.blocks)
        ) {
          try fixture.fill(peers)
        } peer: {
          try seconds { try peers.decode() }
        })
    }
    if isWanted("pager.pool") {
      try report(try FairnessBenchmark(image: fixture.stored, rounds: rounds).result())
    }
    if isWanted("serve") {
      let service = ServiceBenchmark(image: fixture.stored, rounds: rounds)
      for result in try service.results() { try report(result) }
    }
  }

  private func isWanted(_ name: String) -> Bool { only.isEmpty || name.contains(only) }

  /// Pages a second, ours and the peer's in turns.
  ///
  /// - Parameter blocks: how many pages each handles, if not all.
  private func compare(
    _ fixture: PagerFixture, _ name: String, _ limit: BenchmarkResult.Limit,
    blocks: (ours: Int, peer: Int)? = nil, ours: () throws -> Double, peer: () throws -> Double
  ) throws -> BenchmarkResult {
    let all = fixture.length / 4096
    let blocks = blocks ?? (all, all)
    var rates: (ours: [Double], peer: [Double]) = ([], [])
    for round in 0...rounds {
      let mine: Double
      let theirs: Double
      if round % 2 == 0 {
        mine = try ours()
        theirs = try peer()
      } else {
        theirs = try peer()
        mine = try ours()
      }
      guard round > 0 else { continue }
      rates.ours.append((Double(blocks.ours) / mine).rounded())
      rates.peer.append((Double(blocks.peer) / theirs).rounded())
    }
    return BenchmarkResult(
      name: name, unit: "pages/s", ours: rates.ours, peer: rates.peer, limit)
  }
}

/// A guest of real content: an image that is stored, one that is compressed, and the same in
/// memory for the peers.
final class PagerFixture: Sendable {
  let length: Int
  let kind: TestGuest.Kind = TestGuest.kvmIsAvailable() ? .kvm : .process
  let stored = temporaryImage("stored")
  let compressed = temporaryImage("compressed")
  let raw: Mapping
  private let states: [[UInt8]]

  var name: String { kind == .kvm ? "kvm" : "process" }

  init(length: Int) throws {
    self.length = length
    let memory = GuestMemoryHandle(try GuestMemoryObject(backing: .anonymous, length: length))
    let guest = try TestGuest(booting: memory.range, kind: kind)
    defer { guest.shutdown() }
    _ = try guest.run(.fill(seed: 1))
    let snapshotter = Snapshotter(TestGuestSnapshots(guest, memory))
    _ = try snapshotter.take(
      to: stored, SnapshotOptions(image: ImageOptions(encoding: .stored)), leavesPaused: true)
    _ = try snapshotter.take(to: compressed, leavesPaused: true)
    states = try guest.saveState()
    let raw = try Mapping(anonymous: length)
    // SAFETY: the guest is paused; both mappings are this long.
    unsafe raw.pointer.copyMemory(from: memory.object.mapping.pointer, byteCount: length)
    self.raw = raw
  }

  func remove() {
    for path in [stored, compressed] { try? removeFile(path) }
  }

  // MARK: - A guest that touches all of its pages

  /// Seconds from the beginning of the restore until the guest has touched every page.
  func touch(_ image: FilePath, _ order: PageOrder) throws -> Double {
    try seconds {
      let restored = try RestoredGuest(image)
      defer { restored.shutdown() }
      _ = try restored.guest.run(.touch(order: order))
    }
  }

  /// The same with the minimal handler, which has everything in memory.
  func touchPeer(_ order: PageOrder) throws -> Double {
    try seconds {
      let memory = try GuestMemoryObject(backing: .anonymous, length: length)
      let userfaultfd = try Userfaultfd(wanting: [])
      try userfaultfd.register(memory.range, modes: .missing)
      guard
        let handler = unsafe minimal_handler_start(
          userfaultfd.descriptor.rawValue, memory.range.start.rawValue, UInt64(length),
          raw.range.start.rawValue, 0)
      else { throw Errno.noMemory }
      defer { unsafe minimal_handler_stop(handler) }
      let guest = try TestGuest(restoring: memory.range, states: states, kind: kind)
      defer { guest.shutdown() }
      _ = try guest.run(.touch(order: order))
    }
  }

  /// Records the working set of such a guest into the stored image.
  func record(_ order: PageOrder) throws {
    var options = RestoreOptions()
    options.pager.records = true
    let restored = try RestoredGuest(stored, options)
    defer { restored.shutdown() }
    _ = try restored.guest.run(.touch(order: order))
    try MemoryImage.setWorkingSet(restored.session.recordedWorkingSet, of: stored)
  }

  // MARK: - In bulk

  /// Has the machine's memory at hand, outside of what is timed: a hypervisor that takes back
  /// what a guest has freed (free page reporting) gives it again at the first touch, for several
  /// times what a fault costs.
  private func warmUp() throws {
    let memory = try Mapping(anonymous: length)
    try memory.advise(.populateWrite, offset: 0, length: length)
  }

  /// Seconds to bring all pages, in order, into memory that nobody uses.
  func replay(_ path: FilePath) throws -> Double {
    try warmUp()
    let memory = try GuestMemoryObject(backing: .anonymous, length: length)
    let session = try PagerSession(
      userfaultfd: try Userfaultfd(wanting: PagerSession<ImageSource>.features.wanted),
      regions: [try PagedRegion(memory, mode: .missing)],
      source: ImageSource(try MemoryImage(path: path)))
    defer { session.release() }
    try session.start()
    return try seconds {
      try session.replay([WorkingSetRun(region: 0, firstBlock: 0, blockCount: length / 4096)])
    }
  }

  /// The same by UFFDIO_COPY in pieces of 1 MiB from memory, with two threads, and nothing
  /// else.
  func copyRaw() throws -> Double {
    try warmUp()
    let memory = try GuestMemoryObject(backing: .anonymous, length: length)
    let target = try RawTarget(memory.range)
    return try seconds {
      try PieceWork(pieces: length >> 20, threads: 2).run(name: "raw") { (piece) throws(Errno) in
        // SAFETY: the piece lies in both.
        let resolution = unsafe target.userfaultfd.copy(
          from: self.raw.pointer + piece << 20,
          to: target.range.start.advanced(by: piece << 20), length: 1 << 20)
        guard resolution.obstacle == nil else { throw .ioError }
      }
    }
  }

  /// Seconds that the least takes which any filler has to do.
  func fill(_ peers: BulkPeers) throws -> Double {
    try warmUp()
    let memory = try GuestMemoryObject(backing: .anonymous, length: length)
    let target = try RawTarget(memory.range)
    return try seconds { try peers.fill(target) }
  }
}
