// SPDX-License-Identifier: Apache-2.0

import Foundation
import GuestMemory
import LinuxSystem
import SystemPackage
import TestSupport
import Testing
import Userfault

@testable import Pager

@Suite("Caches that share a limit, and clones that go on alone")
struct CacheBudgetTests {
  /// A clone of a cache in this process.
  private final class Clone: Sendable {
    let mapping: Mapping
    let session: PagerSession<PatternSource>

    init(_ cache: SharedPageCache, _ source: PatternSource = PatternSource()) throws {
      let mapping = try cache.makeMapping()
      session = try PagerSession(
        userfaultfd: try Userfaultfd(wanting: PagerSession<PatternSource>.features.wanted),
        regions: [try PagedRegion(cloneOf: cache, host: mapping.range)], source: source)
      self.mapping = mapping
      try session.start()
    }

    deinit { session.release() }

    /// Touches blocks; those that are not as the source has them.
    func wrong(_ blocks: some Sequence<Int>, seed: UInt64 = 7) -> [Int] {
      blocks.filter {
        load(mapping.range, offset: $0 * 4096) != PatternSource.word(block: $0, seed: seed)
      }
    }
  }

  private let length = 1024 * 4096

  @Test("Room comes from pages that no clone has, of the own cache first, then of others")
  func order() throws {
    let budget = CacheBudget(limit: 4 << 20)
    let (first, second) = (
      try SharedPageCache(length: length, budget: budget),
      try SharedPageCache(length: length, budget: budget)
    )
    // 896 pages of each have data, and 1024 have room.
    #expect(try Clone(first).wrong(0..<1024).isEmpty)
    #expect(budget.usedBytes == 896 * 4096)
    #expect(try Clone(second).wrong(0..<512).isEmpty)
    #expect(budget.usedBytes <= budget.limit)
    let taken = first.evictedPages
    #expect(taken >= 448 - 128 && second.evictedPages == 0)
    // The second cache gives up its own pages, while it has some.
    let clone = try Clone(second)
    #expect(clone.wrong(768..<1024).isEmpty)
    #expect(second.evictedPages >= 224 && first.evictedPages == taken)
    // And none that a clone has.
    let before = clone.session.statistics.faults
    #expect(try Clone(first).wrong(0..<1024).isEmpty)
    #expect(clone.wrong(768..<1024).isEmpty)
    #expect(clone.session.statistics.faults == before)
    #expect(budget.evictedPages == first.evictedPages + second.evictedPages)
    #expect(budget.usedBytes == first.usedBytes + second.usedBytes)
  }

  @Test("A cache that goes gives its room back")
  func end() throws {
    let budget = CacheBudget(limit: 1 << 20)
    do {
      let cache = try SharedPageCache(length: length, budget: budget)
      #expect(try Clone(cache).wrong(0..<1024).isEmpty)
      #expect(budget.usedBytes > 1 << 19)
    }
    #expect(budget.usedBytes == 0)
    let cache = try SharedPageCache(length: length, budget: budget)
    let clone = try Clone(cache)
    #expect(clone.wrong(0..<128).isEmpty)
    #expect(Delay.until { clone.session.statistics.continuedPages >= 112 })
  }

  @Test("Storms over several caches that all have too little room")
  func storm() throws {
    let budget = CacheBudget(limit: 1 << 20)
    let length = 512 * 4096
    let caches = try (0..<3).map { _ in try SharedPageCache(length: length, budget: budget) }
    try inThreads(4) { thread in
      var random = SeededRandom(seed: UInt64(thread) + 3)
      for round in 0..<16 {
        let cache = (thread + round) % caches.count
        let seed = UInt64(cache) + 7
        guard let clone = try? Clone(caches[cache], PatternSource(seed: seed)) else {
          Issue.record("no clone")
          return
        }
        for _ in 0..<40 {
          let wrong = clone.wrong(random.part(of: 0..<512, atMost: 32), seed: seed)
          if !wrong.isEmpty { Issue.record("thread \(thread), cache \(cache): \(wrong)") }
        }
        clone.session.release()
      }
    }
    #expect(budget.usedBytes <= budget.limit)
    #expect(budget.usedBytes == caches.reduce(0) { $0 + $1.usedBytes })
    #expect(budget.evictedPages > 100)
  }

  @Test("A limit that takes nothing out goes around what has no room", arguments: CloneTests.sizes)
  func withoutEviction(size: PageSize) throws {
    guard size == .size4KiB || Host.hasHugePages(24) else { return }
    let budget = CacheBudget(limit: size == .size4KiB ? 1 << 20 : size.bytes, evicts: false)
    let length = size == .size4KiB ? 1024 * 4096 : 2 * size.bytes
    let cache = try SharedPageCache(length: length, pageSize: size, budget: budget)
    let (first, second) = (try Clone(cache), try Clone(cache))
    #expect(first.wrong(0..<length / 4096).isEmpty)
    #expect(second.wrong(0..<length / 4096).isEmpty)
    #expect(budget.usedBytes == cache.usedBytes && cache.usedBytes <= budget.limit)
    #expect(cache.usedBytes > budget.limit / 2)
    #expect(budget.evictedPages == 0)
  }

  @Test("A clone that is let go of keeps its pages and its zeros", arguments: CloneTests.sizes)
  func detach(size: PageSize) throws {
    guard size == .size4KiB || Host.hasHugePages(24) else { return }
    let budget = CacheBudget(limit: size == .size4KiB ? 2 << 20 : 2 * size.bytes)
    let length = size == .size4KiB ? 1024 * 4096 : 4 * size.bytes
    let cache = try SharedPageCache(length: length, pageSize: size, budget: budget)
    let clone = try Clone(cache)
    let blocks = length / 4096
    #expect(clone.wrong(0..<blocks / 2).isEmpty)
    try clone.mapping.advise(.dontNeed, offset: 0, length: size.bytes)
    store(5, clone.mapping.range, offset: length / 2 - 4096)
    // Some that were not touched may have come along.
    guard case .missing(1...) = clone.session.letGo() else {
      Issue.record("all pages are there")
      return
    }
    // Others fill the cache, and want more room than there is.
    for _ in 0..<2 { #expect(try Clone(cache).wrong(0..<blocks).isEmpty) }
    for block in 0..<size.bytes / 4096 {
      #expect(load(clone.mapping.range, offset: block * 4096) == 0)
    }
    #expect(clone.wrong(size.bytes / 4096..<blocks / 2 - 1).isEmpty)
    #expect(load(clone.mapping.range, offset: length / 2 - 4096) == 5)
    #expect(guardedLoad(clone.mapping.range, offset: length - 4096) == .busError)
  }

  @Test(
    "Other users can read a cache's file and not open it for writing",
    .enabled(if: Host.hasPrivileges, "needs root"),
    arguments: [false, true])
  func mode(withBudget: Bool) throws {
    let budget = CacheBudget(limit: 1 << 20)
    let cache = try SharedPageCache(length: length, budget: withBudget ? budget : nil)
    let reader = try cache.duplicateForReading()
    func asNobody(_ command: String) throws -> Int32 {
      let process = Process()
      process.executableURL = URL(fileURLWithPath: "/usr/bin/setpriv")
      process.arguments = [
        "--reuid=65534", "--regid=65534", "--clear-groups", "/bin/sh", "-c", command,
      ]
      process.standardInput = FileHandle(fileDescriptor: reader.rawValue, closeOnDealloc: false)
      process.standardError = FileHandle.nullDevice
      try launch(process)
      process.waitUntilExit()
      return process.terminationStatus
    }
    #expect(try asNobody("head -c 16 > /dev/null") == 0)
    #expect(try asNobody(": >> /proc/self/fd/0") != 0)
    #expect(try asNobody(": <> /proc/self/fd/0") != 0)
  }
}
