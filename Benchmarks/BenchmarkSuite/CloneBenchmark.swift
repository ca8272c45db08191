// SPDX-License-Identifier: Apache-2.0

import Foundation
import GuestMemory
import LinuxSystem
import MemoryImage
import Pager
import SystemPackage
import Userfault

/// Clones of 1 GiB of data: how fast a later one gets its clean pages, and what eight take. The
/// source is memory: what is measured is the cache.
struct CloneBenchmark {
  let length: Int
  let rounds: Int

  func results() throws -> [BenchmarkResult] {
    var rates: (ours: [Double], peer: [Double]) = ([], [])
    let source = MappedMemorySource(.init(try Mapping(anonymous: length)))
    let cache = try SharedPageCache(length: length)
    let first = try Clone(cache, source)
    try first.session.replay(whole)
    let pages = Double(length / 4096)
    for round in 0...rounds {
      let mine = try Clone(cache, source)
      let seconds = (ours: try seconds { try mine.session.replay(whole) }, peer: try raw(cache))
      mine.session.release()
      guard round > 0 else { continue }
      rates.ours.append((pages / seconds.ours).rounded())
      rates.peer.append((pages / seconds.peer).rounded())
    }
    return [
      BenchmarkResult(
        name: "pager.clone.second", unit: "pages/s", ours: rates.ours, peer: rates.peer,
        .atLeast(0.8)),
      try memory(source),
    ]
  }

  private var whole: [WorkingSetRun] {
    [WorkingSetRun(region: 0, firstBlock: 0, blockCount: length / 4096)]
  }

  /// Memory of eight clones that have all pages, against that of one.
  private func memory(_ source: MappedMemorySource) throws -> BenchmarkResult {
    var sizes: (one: [Double], eight: [Double]) = ([], [])
    for _ in 0..<2 {
      let before = try proportionalKiB()
      let cache = try SharedPageCache(length: length)
      var clones = [try Clone(cache, source)]
      try clones[0].session.replay(whole)
      let one = try proportionalKiB() - before
      for _ in 1..<8 {
        let clone = try Clone(cache, source)
        try clone.session.replay(whole)
        clones.append(clone)
      }
      let eight = try proportionalKiB() - before
      for clone in clones { clone.session.release() }
      sizes.one.append(one)
      sizes.eight.append(eight)
    }
    return BenchmarkResult(
      name: "pager.clone.memory-of-8", unit: "KiB", ours: sizes.eight, peer: sizes.one,
      .atMost(1.05))
  }

  /// All memory of this process, shared pages counted once (Pss of smaps_rollup, proc(5)).
  private func proportionalKiB() throws -> Double {
    let file = try FileHandle(forReadingFrom: URL(fileURLWithPath: "/proc/self/smaps_rollup"))
    let text = String(decoding: try file.readToEnd() ?? Data(), as: UTF8.self)
    guard let line = text.split(separator: "\n").first(where: { $0.hasPrefix("Pss:") }),
      let value = Double(line.filter(\.isNumber))
    else { throw Errno.protocolError }
    return value
  }

  /// UFFDIO_CONTINUE of a private mapping in pieces of 1 MiB, with two threads, and nothing else.
  private func raw(_ cache: SharedPageCache) throws -> Double {
    let target = try RawClone(cache)
    return try seconds {
      try PieceWork(pieces: length >> 20, threads: 2).run(name: "raw") {
        (piece) throws(Errno) in
        let resolution = target.userfaultfd.continue(
          HostRange(
            start: target.mapping.range.start.advanced(by: piece << 20), length: 1 << 20))
        guard resolution.obstacle == nil else { throw .ioError }
      }
    }
  }

  /// A clone without a pager.
  private final class RawClone: Sendable {
    let mapping: Mapping
    let userfaultfd: Userfaultfd
    init(_ cache: SharedPageCache) throws {
      let mapping = try cache.makeMapping()
      let userfaultfd = try Userfaultfd(wanting: [])
      try userfaultfd.register(mapping.range, modes: [.missing, .minor])
      self.mapping = mapping
      self.userfaultfd = userfaultfd
    }
  }

  /// A clone in this process, without a guest.
  private final class Clone: Sendable {
    let mapping: Mapping
    let session: PagerSession<MappedMemorySource>
    init(_ cache: SharedPageCache, _ source: MappedMemorySource) throws {
      let mapping = try cache.makeMapping()
      session = try PagerSession(
        userfaultfd: try Userfaultfd(wanting: PagerSession<MappedMemorySource>.features.wanted),
        regions: [try PagedRegion(cloneOf: cache, host: mapping.range)], source: source)
      self.mapping = mapping
      try session.start()
    }
  }
}
