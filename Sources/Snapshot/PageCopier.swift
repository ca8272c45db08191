// SPDX-License-Identifier: Apache-2.0

internal import GuestMemory
internal import LinuxSystem
internal import MemoryImage
internal import Synchronization
internal import SystemPackage

/// Copies pages of a guest to an image, with several threads.
///
/// The pages come from two sides when the guest runs: these threads go through all of them,
/// and `PreimagePool` has those that the guest wanted to write meanwhile.
struct PageCopier: Sendable {
  let layout: SnapshotLayout
  let writer: ImageBlockWriter
  let threads: Int
  let progress: (@Sendable (_ done: Int, _ total: Int) -> Void)?
  /// What keeps the guest from changing pages before they are copied; `nil` when it is paused.
  let preimages: PreimageGuard?

  private final class Shared: Sendable {
    let ranges: Mutex<PageQueue>
    let done = Atomic<Int>(0)
    let hasFailed = Atomic(false)
    init(_ queue: consuming PageQueue) { ranges = Mutex(queue) }
  }

  /// Copies pages; returns when they are in the file. After an error what was copied is of no
  /// use, and the guest has stopped waiting.
  func copy(_ pages: DirtyBitmap) throws(SnapshotError) {
    let shared = Shared(PageQueue(pages, layout))
    let total = pages.count * 4096
    do throws(SnapshotError) {
      try PieceWork(pieces: threads, threads: threads).run(name: "snapshot") {
        (_) throws(SnapshotError) in
        do throws(SnapshotError) {
          try work(shared, total: total)
        } catch {
          shared.hasFailed.store(true, ordering: .relaxed)
          preimages?.fail()
          throw error
        }
      }
    } catch {
      // A thread that was never begun has failed nothing.
      preimages?.fail()
      throw error
    }
  }

  private func work(_ shared: Shared, total: Int) throws(SnapshotError) {
    let batch: PageBatch
    do throws(Errno) {
      batch = try PageBatch()
    } catch {
      throw SnapshotError(.memory, "There is no memory to copy pages to: \(error)")
    }
    while !shared.hasFailed.load(ordering: .relaxed) {
      // First what the guest may be waiting for.
      if let preimages { try writeFull(of: preimages.pool) }
      let piece = shared.ranges.withLock { $0.next(upTo: PageBatch.capacity) }
      guard !piece.isEmpty else { return }
      let count = piece.reduce(0) { $0 + $1.count }
      if let preimages {
        try preimages.copy(piece, into: batch)
      } else {
        for run in piece { try batch.append(run, layout) }
      }
      try write(batch)
      batch.removeAll()
      let done = shared.done.wrappingAdd(count * 4096, ordering: .relaxed).newValue
      progress?(done, total)
    }
  }

  /// Writes a full batch, if there is one.
  func writeFull(of pool: PreimagePool) throws(SnapshotError) {
    guard let batch = pool.takeFull() else { return }
    try write(batch)
    pool.recycle(batch)
  }

  /// Writes what was collected since the last call.
  func writeRest(of pool: PreimagePool) throws(SnapshotError) {
    while let batch = pool.takeRest() {
      try write(batch)
      pool.recycle(batch)
    }
    if let page = pool.unreadable { throw layout.unreadable(page) }
  }

  private func write(_ batch: PageBatch) throws(SnapshotError) {
    var first = 0
    while first < batch.pages.count {
      let number = layout.region(of: batch.pages[first])
      let region = layout.regions[number]
      var end = first + 1
      while end < batch.pages.count, region.pages.contains(batch.pages[end]) { end += 1 }
      do throws(ImageError) {
        try unsafe writer.write(
          region: number, blocks: batch.pages[first..<end].map { $0 - region.firstPage },
          bytes: batch.bytes(first..<end))
      } catch {
        throw SnapshotError(.image, error.description)
      }
      first = end
    }
  }
}

extension PageBatch {
  /// Adds copies of pages of one region.
  func append(_ run: Range<Int>, _ layout: SnapshotLayout) throws(SnapshotError) {
    let count: Int
    do throws(Errno) {
      count = try append(run, from: layout.address(of: run.lowerBound))
    } catch {
      throw SnapshotError(.memory, "The guest's memory cannot be copied: \(error)")
    }
    guard count == run.count else { throw layout.unreadable(run.lowerBound + count) }
  }
}

/// Hands out pages of a set, a few runs at a time.
struct PageQueue: ~Copyable {
  private let layout: SnapshotLayout
  private var runs: DirtyBitmap.PageRanges
  private var rest: Range<Int>?

  init(_ pages: DirtyBitmap, _ layout: SnapshotLayout) {
    self.layout = layout
    runs = pages.ranges
  }

  /// The next pages, in order and of one region; empty when there are none left.
  mutating func next(upTo limit: Int) -> [Range<Int>] {
    var result: [Range<Int>] = []
    var room = limit
    var end: Int?
    while room > 0, let run = rest ?? runs.next() {
      let regionEnd = end ?? layout.regions[layout.region(of: run.lowerBound)].pages.upperBound
      end = regionEnd
      rest = run
      guard run.lowerBound < regionEnd else { break }
      let cut = min(run.upperBound, run.lowerBound + room, regionEnd)
      result.append(run.lowerBound..<cut)
      room -= cut - run.lowerBound
      rest = cut < run.upperBound ? cut..<run.upperBound : nil
    }
    return result
  }
}
