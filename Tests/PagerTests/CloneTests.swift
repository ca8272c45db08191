// SPDX-License-Identifier: Apache-2.0

import GuestMemory
import LinuxSystem
import Synchronization
import SystemPackage
import TestSupport
import Testing
import Userfault

@testable import Pager

@Suite("Clones that share their clean pages")
struct CloneTests {
  /// A kind of page, with how many a test takes.
  static let sizes: [PageSize] = [.size4KiB, .size2MiB]

  /// A clone in this process.
  private final class Clone: Sendable {
    let mapping: Mapping
    let region: PagedRegion
    let session: PagerSession<PatternSource>

    init(
      _ cache: SharedPageCache, source: PatternSource = PatternSource(),
      faultAround: FaultAround = .adaptive, pool: PagerPool? = nil, starts: Bool = true
    ) throws {
      let mapping = try cache.makeMapping()
      region = try PagedRegion(cloneOf: cache, host: mapping.range)
      var options = PagerOptions()
      options.faultAround = faultAround
      session = try PagerSession(
        userfaultfd: try Userfaultfd(wanting: PagerSession<PatternSource>.features.wanted),
        regions: [region], source: source, options: options)
      self.mapping = mapping
      guard starts else { return }
      if let pool { try session.start(in: pool) } else { try session.start() }
    }

    deinit { session.release() }
    var range: HostRange { mapping.range }

    func wrong(_ blocks: some Sequence<Int>) -> [Int] {
      blocks.filter {
        load(range, offset: $0 * 4096) != PatternSource.word(block: $0, seed: 7)
      }
    }
  }

  private func cache(
    _ size: PageSize, pages: Int = 512, limit: Int? = nil
  ) throws -> SharedPageCache {
    try SharedPageCache(
      length: size == .size4KiB ? pages * 4096 : 2 * size.bytes, pageSize: size,
      budget: limit.map { CacheBudget(limit: $0) })
  }

  private func hasPages(_ size: PageSize) -> Bool { size == .size4KiB || Host.hasHugePages(24) }

  @Test(
    "What a clone wrote into a page of its own is never taken away to make room",
    .enabled(if: Host.hasHugePages(24), "needs 24 free pages of 2 MiB"))
  func ownHugePage() throws {
    let cache = try self.cache(.size2MiB, limit: 2 << 20)
    let (first, second) = (try Clone(cache), try Clone(cache))
    #expect(first.wrong(0..<1).isEmpty)
    // Given back, and then a page of its own.
    try first.mapping.advise(.dontNeed, offset: 0, length: 2 << 20)
    store(0x1111, first.range, offset: 4096)
    // The other one wants room for the second page, and nobody has the first one any more.
    #expect(second.wrong(512..<1024).isEmpty)
    #expect(second.wrong(0..<512).isEmpty)
    #expect(load(first.range, offset: 4096) == 0x1111)
    #expect(load(first.range, offset: 0) == 0)
  }

  @Test(
    "Several faults on one huge page at the same time hold up nobody",
    .enabled(if: Host.hasHugePages(24), "needs 24 free pages of 2 MiB"))
  func simultaneousFaults() throws {
    let cache = try self.cache(.size2MiB)
    let clone = try Clone(cache, starts: false)
    let range = clone.range
    let touches = try (0..<8).map { number in
      try ThreadHandle.start { _ = load(range, offset: (number % 2) << 21) }
    }
    Delay.microseconds(50_000)
    try clone.session.start()
    for touch in touches { touch.join() }
    #expect(Delay.until { clone.session.pendingReads == 0 })
    #expect(clone.session.statistics.shortages == 0)
    #expect(clone.wrong(0..<1024).isEmpty)
  }

  @Test(
    "All clones have the right content, and the source is read once", arguments: sizes,
    [false, true])
  func content(size: PageSize, withPool: Bool) throws {
    guard hasPages(size) else { return }
    let cache = try cache(size)
    let source = PatternSource()
    let pool = withPool ? try PagerPool(threads: 2) : nil
    let clones = try (0..<4).map { _ in try Clone(cache, source: source, pool: pool) }
    let blocks = cache.length / 4096
    try inThreads(4) { number in
      #expect(clones[number].wrong(0..<blocks).isEmpty)
    }
    #expect(cache.usedBytes <= cache.length)
    let counts = clones.map(\.session.statistics)
    #expect(counts.allSatisfy { $0.copiedPages == 0 })
    if size == .size4KiB {
      // Zeros take no room.
      #expect(cache.usedBytes == cache.length / 8 * 7)
      #expect(
        Delay.until {
          clones.allSatisfy { $0.session.statistics.continuedPages == UInt64(blocks / 8 * 7) }
        })
    }
    let reads = source.readCount
    let late = try Clone(cache, source: source)
    #expect(late.wrong(0..<blocks).isEmpty)
    // Only zeros are asked for again, and what a signal lets fault twice.
    #expect(source.readCount - reads <= blocks / 8 + 8)
    clones.forEach { $0.session.stop() }
  }

  @Test("What a clone writes is its own", arguments: sizes)
  func writes(size: PageSize) throws {
    guard hasPages(size) else { return }
    let cache = try cache(size)
    let (first, second) = (try Clone(cache), try Clone(cache))
    // Before it was touched, and after.
    _ = load(first.range, offset: 4096)
    for block in 0..<16 { store(UInt64(block) + 1000, first.range, offset: block * 4096) }
    #expect(second.wrong(0..<64).isEmpty)
    for block in 0..<16 { #expect(load(first.range, offset: block * 4096) == UInt64(block) + 1000) }
    #expect(first.wrong(16..<64).isEmpty)
    #expect(try Clone(cache).wrong(0..<64).isEmpty)
  }

  @Test("What a clone gives back is zero for it, and for no other", arguments: sizes)
  func removes(size: PageSize) throws {
    guard hasPages(size) else { return }
    let cache = try cache(size)
    let (first, second) = (try Clone(cache), try Clone(cache))
    let half = cache.length / 2
    let blocks = cache.length / 4096
    _ = first.wrong(stride(from: 0, to: blocks, by: 3))
    store(99, first.range, offset: 0)
    try first.mapping.advise(.dontNeed, offset: 0, length: half)
    for block in 0..<blocks / 2 { #expect(load(first.range, offset: block * 4096) == 0) }
    #expect(first.wrong(blocks / 2..<blocks).isEmpty)
    #expect(second.wrong(0..<blocks).isEmpty)
    // And it can be written to again.
    store(7, first.range, offset: 0)
    #expect(load(first.range, offset: 0) == 7)
  }

  @Test("A damaged page is one for every clone that touches it")
  func damage() throws {
    let cache = try cache(.size4KiB)
    let source = PatternSource(damagedBlocks: [100])
    for _ in 0..<2 {
      let clone = try Clone(cache, source: source)
      try #require(clone.session.canPoison, "this kernel has no UFFDIO_POISON")
      #expect(guardedLoad(clone.range, offset: 100 * 4096) == .busError)
      #expect(clone.wrong(0..<100).isEmpty && clone.wrong(101..<512).isEmpty)
      #expect(clone.session.failures.count == 1)
    }
  }

  @Test("The limit of a cache is kept, and every page is right", arguments: sizes)
  func limit(size: PageSize) throws {
    guard hasPages(size) else { return }
    let limit = size == .size4KiB ? 1 << 20 : size.bytes
    let cache = try cache(size, pages: 2048, limit: limit)
    let blocks = cache.length / 4096
    let clones = try (0..<2).map { _ in try Clone(cache) }
    for clone in clones { #expect(clone.wrong(0..<blocks).isEmpty) }
    #expect(cache.usedBytes <= limit)
    // What found no room is theirs alone. (A page is counted just after its waiter was woken.)
    #expect(Delay.until { clones.allSatisfy { $0.session.statistics.copiedPages > 0 } })
    #expect(cache.evictedPages == 0, "a page that a clone has was taken out")
  }

  @Test("Pages that no clone has any more make room, and only those")
  func eviction() throws {
    let cache = try cache(.size4KiB, pages: 1024, limit: 1 << 20)
    let steady = try Clone(cache, faultAround: .off)
    #expect(steady.wrong(0..<64).isEmpty)
    do {
      let first = try Clone(cache)
      #expect(first.wrong(0..<512).isEmpty)
      first.session.release()
    }
    let second = try Clone(cache)
    #expect(second.wrong(512..<1024).isEmpty)
    #expect(cache.evictedPages > 100)
    #expect(cache.usedBytes <= 1 << 20)
    #expect(Delay.until { second.session.statistics.continuedPages > 100 })
    // Those of a clone that is there were not touched.
    let faults = steady.session.statistics.faults
    #expect(steady.wrong(0..<64).isEmpty)
    #expect(steady.session.statistics.faults == faults)
  }

  @Test("Storms of clones that touch, write, give back, come and go over a small cache")
  func storm() throws {
    let cache = try cache(.size4KiB, pages: 1024, limit: 1 << 20)
    let pool = try PagerPool(threads: 2)
    try inThreads(4) { thread in
      var generator = SplitMix(seed: UInt64(thread) + 1)
      for _ in 0..<12 {
        guard
          let clone = try? Clone(cache, faultAround: thread % 2 == 0 ? .off : .adaptive, pool: pool)
        else {
          Issue.record("no clone")
          return
        }
        // What is to be in each page; `nil` for the image's.
        var expected = [UInt64?](repeating: nil, count: 1024)
        for step in 0..<600 {
          let block = Int(generator.next() % 1024)
          switch generator.next() % 8 {
          case 0:
            let count = min(1024 - block, Int(generator.next() % 16) + 1)
            try? clone.mapping.advise(.dontNeed, offset: block * 4096, length: count * 4096)
            for page in block..<block + count { expected[page] = 0 }
          case 1, 2:
            store(UInt64(step) + 1, clone.range, offset: block * 4096)
            expected[block] = UInt64(step) + 1
          default:
            let right = expected[block] ?? PatternSource.word(block: block, seed: 7)
            let found = load(clone.range, offset: block * 4096)
            if found != right {
              Issue.record("thread \(thread), block \(block): \(found), not \(right)")
            }
          }
        }
        clone.session.release()
      }
    }
    #expect(cache.usedBytes <= 1 << 20)
    // Nobody has a page any more: all can be taken out.
    let last = try Clone(cache)
    #expect(last.wrong(0..<1024).isEmpty)
  }

  @Test("Only the cache writes to its file")
  func sealed() throws {
    let cache = try cache(.size4KiB)
    let clone = try Clone(cache)
    #expect(clone.wrong(0..<8).isEmpty)
    func refusal(_ body: () throws(Errno) -> Void) -> Errno? {
      do throws(Errno) {
        try body()
        return nil
      } catch { return error }
    }
    let reader = try cache.duplicateForReading()
    let path = "/proc/self/fd/\(reader.rawValue)"
    #expect(
      refusal { () throws(Errno) in
        _ = try Mapping(of: reader, length: 4096, sharing: .shared, writable: true)
      } == .permissionDenied)
    // Whoever may opens it anew for writing.
    let writer = try OwnedDescriptor(openingForUpdate: FilePath(path))
    let page = try Mapping(anonymous: 4096)
    let written = refusal { () throws(Errno) in
      let bytes = unsafe UnsafeRawBufferPointer(start: page.pointer, count: 1)
      try unsafe writer.writeAll(bytes, at: 0)
    }
    #expect(written == .notPermitted)
    #expect(refusal { () throws(Errno) in try writer.setLength(0) } == .notPermitted)
    #expect(
      refusal { () throws(Errno) in
        _ = try Mapping(of: writer, length: 4096, sharing: .shared, writable: true)
      } == .notPermitted)
    #expect(clone.wrong(0..<8).isEmpty)
  }

  @Test("Without REMOVE events a clone is refused")
  func events() throws {
    let cache = try cache(.size4KiB)
    let mapping = try cache.makeMapping()
    let region = try PagedRegion(cloneOf: cache, host: mapping.range)
    let error = #expect(throws: PagerError.self) {
      _ = try PagerSession(
        userfaultfd: try Userfaultfd(), regions: [region], source: PatternSource())
    }
    #expect(error?.code == .invalidRegion)
  }
}

private struct SplitMix {
  private var state: UInt64
  init(seed: UInt64) { state = seed }
  mutating func next() -> UInt64 {
    state &+= 0x9E37_79B9_7F4A_7C15
    var value = state
    value = (value ^ value >> 30) &* 0xBF58_476D_1CE4_E5B9
    value = (value ^ value >> 27) &* 0x94D0_49BB_1331_11EB
    return value ^ value >> 31
  }
}
