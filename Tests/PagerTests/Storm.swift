// SPDX-License-Identifier: Apache-2.0

import GuestMemory
import LinuxSystem
import MemoryImage
import Pager
import Synchronization
import TestSupport
import Userfault

/// How a storm is served.
struct StormWay: Sendable, CustomStringConvertible {
  let threads: Int
  let isPooled: Bool
  let faultAround: FaultAround

  var description: String {
    "\(threads) \(isPooled ? "shared " : "")threads, fault-around \(faultAround)"
  }

  static let all = [
    StormWay(threads: 1, isPooled: false, faultAround: .off),
    StormWay(threads: 1, isPooled: false, faultAround: .adaptive),
    StormWay(threads: 3, isPooled: false, faultAround: .off),
    StormWay(threads: 3, isPooled: false, faultAround: .adaptive),
    StormWay(threads: 2, isPooled: true, faultAround: .adaptive),
  ]
}

/// Guest threads that read, write, give back and unmap pages at random, each time the owner of a
/// plot, against whoever reads anywhere, and against filling ahead.
final class Storm: Sendable {
  /// A plot; whoever has the lock is its owner.
  private final class Bed: Sendable {
    let plot: Mutex<Plot>
    init(_ plot: Plot) { self.plot = Mutex(plot) }
  }

  private struct Tally {
    var wrong: [String] = []
    var removals = 0
    var unmaps = 0
  }

  private let kind: MemoryCase
  private let seed: UInt64
  private let memory: GuestMemoryObject
  private let region: PagedRegion
  let session: PagerSession<UnsteadySource>
  private let pool: PagerPool?
  private let beds: [Bed]
  private let steps: Int
  private let tally = Mutex(Tally())
  private let guestsLeft = Atomic<Int>(0)
  /// Where the wanderer is.
  private let front = Atomic<Int>(0)

  private var pageBytes: Int { region.pageSize.bytes }
  private var blocksInPage: Int { pageBytes / 4096 }
  private var range: HostRange { memory.range }

  init(_ kind: MemoryCase, _ way: StormWay, seed: UInt64) throws {
    let isSmall = kind.backing.pageSize == .size4KiB
    let pages = isSmall ? 1024 : 8
    let memory = try GuestMemoryObject(
      backing: kind.backing, length: pages * kind.backing.pageSize.bytes)
    let region = try PagedRegion(memory, mode: kind.mode)
    var habits = UnsteadySource.Habits()
    habits.longestDelay = seed % 2 == 0 ? 400 : 0
    habits.givesShortRuns = seed % 3 == 0
    habits.atHandPercent = seed % 2 == 0 ? 70 : 100
    var options = PagerOptions(faultThreads: way.threads)
    options.faultAround = way.faultAround
    session = try PagerSession(
      userfaultfd: try Userfaultfd(wanting: PagerSession<UnsteadySource>.features.wanted),
      regions: [region], source: UnsteadySource(habits, seed: seed), options: options)
    pool = way.isPooled ? try PagerPool(threads: way.threads, capacity: 1) : nil
    let size = isSmall ? 16 : 2
    let blocks = region.pageSize.bytes / 4096
    beds = stride(from: 0, to: pages, by: size).map { first in
      Bed(
        Plot(kind, pages: first..<first + size) { page in
          UnsteadySource.expected(block: page * blocks)
        })
    }
    steps = isSmall ? 250 : 60
    self.memory = memory
    self.region = region
    self.kind = kind
    self.seed = seed
    if let pool { try session.start(in: pool) } else { try session.start() }
  }

  deinit { session.release() }

  /// Lets it rage and abate, and looks at every page afterwards.
  ///
  /// - Returns: what was not as it must be.
  func run() throws -> [String] {
    guestsLeft.store(3, ordering: .releasing)
    var threads = try (0..<3).map { number in
      try ThreadHandle.start {
        self.live(number)
        self.guestsLeft.wrappingSubtract(1, ordering: .releasing)
      }
    }
    threads.append(try ThreadHandle.start { self.wander() })
    threads.append(try ThreadHandle.start { self.fillAhead() })
    // Hanging for ever, it would not say with which seed.
    guard Delay.until(seconds: 300, { self.guestsLeft.load(ordering: .acquiring) == 0 }) else {
      fatalError("the guests of \(kind), seed \(seed), hang: \(session.statistics)")
    }
    for thread in threads { thread.join() }
    checkAll("at the end")
    let counts = session.statistics
    let (removals, unmaps) = tally.withLock { ($0.removals, $0.unmaps) }
    expect(session.failures.isEmpty, "failures: \(session.failures)")
    expect(counts.failedPages == 0, "\(counts.failedPages) pages failed")
    expect(!session.hasEnded, "the session has ended")
    expect(removals > 0, "there was no storm")
    expect(counts.removeEvents == removals, "\(counts.removeEvents) events of \(removals) removals")
    expect(counts.unmapEvents == unmaps, "\(counts.unmapEvents) events of \(unmaps) unmappings")
    session.release()
    checkAll("after release")
    return tally.withLock { $0.wrong }
  }

  private func expect(_ holds: Bool, _ words: @autoclosure () -> String) {
    guard !holds else { return }
    let words = words()
    tally.withLock { tally in if tally.wrong.count < 8 { tally.wrong.append(words) } }
  }

  // MARK: - Owners

  /// Takes plots at random, often one that lies before the wanderer, and does a few steps on each.
  private func live(_ number: Int) {
    var random = SeededRandom(seed: seed &* 64 &+ UInt64(number))
    var left = steps
    while left > 0 {
      let ahead = front.load(ordering: .relaxed) * beds.count / region.pageCount
      let bed =
        (random.below(2) == 0 ? ahead + random.below(4) : random.below(beds.count)) % beds.count
      let isOwner: Void? = beds[bed].plot.withLockIfAvailable { plot in
        for _ in 0..<min(left, 1 + random.below(8)) {
          step(&plot, mayUnmap: mayUnmap(bed), &random)
          left -= 1
        }
      }
      if isOwner == nil { Delay.microseconds(10) }
    }
  }

  /// Whether a plot's pages may be unmapped: no other thread goes there.
  private func mayUnmap(_ bed: Int) -> Bool { bed % 8 == 7 || beds.count < 8 && bed == 3 }

  private func step(_ plot: inout Plot, mayUnmap: Bool, _ random: inout SeededRandom) {
    guard !plot.mapped.isEmpty else { return }
    let page = plot.mapped[random.below(plot.mapped.count)]
    let some = plot.mapped(of: page..<min(page + 1 + random.below(6), plot.pages.upperBound))
    switch random.below(100) {
    case ..<34: check(page, &plot, random.below(blocksInPage), "a read")
    case ..<40:
      // Upwards, so that neighbours come along, into the next plot too.
      for page in plot.mapped { check(page, &plot, 0, "on the way up") }
    case ..<65:
      // What it was decides what the rest of it is.
      check(page, &plot, random.below(blocksInPage), "before a write")
      let value = mark(of: page) | UInt64(random.below(1 << 20))
      store(value, range, offset: page * pageBytes)
      plot.write(value, page)
    case ..<72:
      advise(.populateRead, some)
      for page in some { check(page, &plot, 0, "after MADV_POPULATE_READ") }
    case 72..<76 where mayUnmap:
      do {
        try memory.mapping.punchOut(
          offset: some.lowerBound * pageBytes, length: some.count * pageBytes)
      } catch { expect(false, "munmap: \(error)") }
      plot.unmap(some)
      tally.withLock { $0.unmaps += 1 }
    default:
      let punches = kind.backing != .anonymous && random.below(3) > 0
      advise(punches ? .remove : .dontNeed, some)
      tally.withLock { $0.removals += 1 }
      if punches { plot.remove(some) } else { plot.drop(some) }
    }
  }

  private func advise(_ advice: MemoryAdvice, _ pages: Range<Int>) {
    do {
      try memory.mapping.advise(
        advice, offset: pages.lowerBound * pageBytes, length: pages.count * pageBytes)
    } catch {
      expect(false, "\(advice) of \(pages): \(error)")
    }
  }

  /// What a guest writes to a page, beside a number: no other page has it, nor the snapshot.
  private func mark(of page: Int) -> UInt64 { 0xFA << 56 | UInt64(page) << 32 }

  /// Reads a page's first word, and one of a block of it that nobody writes.
  private func check(_ page: Int, _ plot: inout Plot, _ block: Int, _ when: String) {
    let seen = load(range, offset: page * pageBytes)
    let rest = load(range, offset: page * pageBytes + block * 4096 + 2048)
    let right = plot.read(page, seen: seen)
    let content = UnsteadySource.expected(block: page * blocksInPage + block)
    let rightRest = plot.restIsSnapshot(page) ? content : 0
    expect(
      seen == right && rest == rightRest,
      "page \(page), \(when): \(hex(seen)), right is \(hex(right)); its block \(block): "
        + "\(hex(rest)), right is \(hex(rightRest)); the snapshot has \(hex(content))")
  }

  private func hex(_ value: UInt64) -> String { String(value, radix: 16) }

  private func checkAll(_ when: String) {
    for bed in beds {
      bed.plot.withLock { plot in
        for page in plot.mapped { check(page, &plot, blocksInPage - 1, when) }
      }
    }
  }

  // MARK: - Neighbours

  /// Reads anywhere, upwards for a while from random pages. Who owns a page may be giving it up
  /// just then, so several answers are right; but no other page's content is.
  private func wander() {
    var random = SeededRandom(seed: seed &* 64 &+ 62)
    let pages = region.pageCount
    let pagesInBed = pages / beds.count
    while guestsLeft.load(ordering: .acquiring) > 0 {
      let first = random.below(pages)
      for page in first..<min(first + 96, pages) where !mayUnmap(page / pagesInBed) {
        front.store(page, ordering: .relaxed)
        let seen = load(range, offset: page * pageBytes)
        let isOwn = seen >> 32 == mark(of: page) >> 32
        let snapshot = UnsteadySource.expected(block: page * blocksInPage)
        expect(
          seen == 0 || seen == snapshot || isOwn, "a wanderer read \(hex(seen)) on page \(page)")
      }
      Delay.microseconds(UInt32(random.below(1500)))
    }
  }

  /// Brings random parts, as a replay does, and in every other storm everything at some time.
  private func fillAhead() {
    var random = SeededRandom(seed: seed &* 64 &+ 63)
    let blocks = region.pageCount * blocksInPage
    let populatesAfter = seed % 2 == 0 ? random.below(30) : .max
    var rounds = 0
    while guestsLeft.load(ordering: .acquiring) > 0 {
      do throws(PagerError) {
        if rounds == populatesAfter {
          try session.populate()
        } else {
          let runs = (0..<3).map { _ in
            let part = random.part(of: 0..<blocks, atMost: 12 * blocksInPage)
            return WorkingSetRun(region: 0, firstBlock: part.lowerBound, blockCount: part.count)
          }
          try session.replay(runs)
        }
      } catch {
        expect(false, "filling: \(error)")
      }
      rounds += 1
      Delay.microseconds(UInt32(random.below(2000)))
    }
  }
}
