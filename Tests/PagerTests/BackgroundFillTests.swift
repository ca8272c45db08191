// SPDX-License-Identifier: Apache-2.0

import GuestMemory
import LinuxSystem
import MemoryImage
import Pager
import Synchronization
import TestSupport
import Testing

@Suite("Filling in the background")
struct BackgroundFillTests {
  @Test("All that has data comes, and the end is told", arguments: MemoryCase.all)
  func fills(kind: MemoryCase) throws {
    let guest = try ServedMemory(kind, pages: kind.pages(2048))
    let isDone = Atomic<Bool>(false)
    try guest.session.startFill { isDone.store(true, ordering: .releasing) }
    #expect(Delay.until { isDone.load(ordering: .acquiring) })
    let progress = guest.session.fillProgress
    #expect(progress == FillProgress.done(guest.range.length))
    guest.session.release()
    #expect(guest.wrongBlocks(0..<guest.blocks).isEmpty)
    #expect(guest.session.statistics.missingFaults == 0)
  }

  @Test("A limit of bytes a second is kept")
  func rate() throws {
    let guest = try ServedMemory(MemoryCase.all[0], pages: 2048)
    let start = MonotonicClock.nanoseconds
    // 7 MiB of data at 20 MiB a second.
    try guest.session.startFill(rate: 20 << 20)
    #expect(Delay.until { guest.session.fillProgress.phase == .done })
    let seconds = Double(MonotonicClock.nanoseconds - start) / 1e9
    #expect(seconds > 0.2, "\(seconds) s")
  }

  @Test("The working set comes first, and alone where the rate is 0")
  func workingSet() throws {
    let guest = try ServedMemory(MemoryCase.all[0], pages: 1024)
    let set = [WorkingSetRun(region: 0, firstBlock: 500, blockCount: 64)]
    try guest.session.startFill(set, rate: 0)
    #expect(Delay.until { guest.session.fillProgress.phase == .done })
    #expect(guest.region.states.count(of: .present) == 64)
    #expect(guest.wrongBlocks(500..<564).isEmpty)
    #expect(guest.session.statistics.faults == 0)
  }

  @Test("It can be stopped and started again, while the guest goes on", arguments: [true, false])
  func stops(withPool: Bool) throws {
    let pool = withPool ? try PagerPool(threads: 1) : nil
    let guest = try ServedMemory(MemoryCase.all[0], pages: 8192, pool: pool)
    let toucher = try ThreadHandle.start {
      #expect(guest.wrongBlocks(stride(from: 8191, to: 0, by: -3)).isEmpty)
    }
    for _ in 0..<10 {
      try guest.session.startFill(rate: 100 << 20)
      Delay.microseconds(2000)
      guest.session.stopFill()
      #expect(guest.session.fillProgress.phase != .filling)
    }
    try guest.session.startFill()
    #expect(Delay.until { guest.session.fillProgress.phase == .done })
    toucher.join()
    #expect(guest.wrongBlocks(0..<8192).isEmpty)
  }

  @Test("Damage is named, and the rest comes")
  func damage() throws {
    let guest = try ServedMemory(
      MemoryCase.all[0], pages: 512, source: PatternSource(damagedBlocks: [100, 101]))
    try guest.session.startFill()
    #expect(Delay.until { guest.session.fillProgress.phase == .done })
    #expect(guest.session.failures.count == 2)
    #expect(guest.wrongBlocks(Array(0..<100) + Array(102..<512)).isEmpty)
  }

  @Test("Stopping a session ends it")
  func sessionStops() throws {
    let guest = try ServedMemory(
      MemoryCase.all[0], pages: 4096, source: PatternSource(delay: 1000))
    try guest.session.startFill()
    #expect(Delay.until { guest.session.statistics.populatedPages > 0 })
    guest.session.stop()
    #expect(guest.session.fillProgress.phase == .idle)
  }
}

extension FillProgress {
  static func done(_ bytes: Int) -> Self {
    var progress = FillProgress()
    progress.phase = .done
    (progress.done, progress.total) = (bytes, bytes)
    return progress
  }
}
