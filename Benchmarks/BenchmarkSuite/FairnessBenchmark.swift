// SPDX-License-Identifier: Apache-2.0

import Glibc
import GuestMemory
import LinuxSystem
import MemoryImage
import Pager
import Synchronization
import SystemPackage
import Userfault

/// 64 sessions in one pool of two threads, whose guests fault at once, all the time.
struct FairnessBenchmark {
  let image: FilePath
  let rounds: Int
  private static let sessions = 64
  private static let faults = 400

  /// The worst p99 of a session, against the average of all, as the guests see it.
  func result() throws -> BenchmarkResult {
    var values: (worst: [Double], average: [Double]) = ([], [])
    let source = ImageSource(try MemoryImage(path: image))
    for round in 0...rounds {
      let tails = try run(source)
      guard round > 0 else { continue }
      values.worst.append((tails.max() ?? 0).rounded())
      values.average.append((tails.reduce(0, +) / Double(tails.count)).rounded())
    }
    return BenchmarkResult(
      name: "pager.pool.p99-of-64", unit: "us", ours: values.worst, peer: values.average,
      .atMost(2))
  }

  /// The p99 of each session, in microseconds.
  private func run(_ source: ImageSource) throws -> [Double] {
    let pool = try PagerPool(threads: 2)
    let guests = try (0..<Self.sessions).map { _ in try Guest(source, pool) }
    let isOpen = Atomic<Bool>(false)
    let tails = Mutex([Double](repeating: 0, count: guests.count))
    var threads: [BenchThread] = []
    for (number, guest) in guests.enumerated() {
      threads.append(
        BenchThread(
          try NamedThread(name: "guest\(number)") {
            while !isOpen.load(ordering: .acquiring) { sched_yield() }
            let tail = guest.touch(Self.faults, seed: UInt64(number))
            tails.withLock { $0[number] = tail }
          }))
    }
    isOpen.store(true, ordering: .releasing)
    for thread in threads { thread.join() }
    for guest in guests { guest.session.release() }
    return tails.withLock { $0 }
  }

  private final class Guest: Sendable {
    let memory: GuestMemoryObject
    let session: PagerSession<ImageSource>

    init(_ source: ImageSource, _ pool: PagerPool) throws {
      let length = source.image.regions[0].length
      let memory = try GuestMemoryObject(backing: .anonymous, length: length)
      var options = PagerOptions()
      options.faultAround = .off
      session = try PagerSession(
        userfaultfd: try Userfaultfd(wanting: PagerSession<ImageSource>.features.wanted),
        regions: [try PagedRegion(memory, mode: .missing)], source: source, options: options)
      self.memory = memory
      try session.start(in: pool)
    }

    /// Touches pages all over the memory; the p99 of how long one takes, in microseconds.
    func touch(_ count: Int, seed: UInt64) -> Double {
      let pages = memory.range.length / 4096
      var times: [UInt64] = []
      times.reserveCapacity(count)
      var sum: UInt64 = 0
      for index in 0..<count {
        let page = (index * 7919 + Int(seed) * 104_729) % pages
        let start = MonotonicClock.nanoseconds
        // SAFETY: the page lies in the mapping.
        sum &+= unsafe (memory.mapping.pointer + page * 4096).load(as: UInt64.self)
        times.append(MonotonicClock.nanoseconds - start)
      }
      // What was read is used, or it would not be read.
      times[0] &+= sum & 1
      times.sort()
      return Double(times[count * 99 / 100]) / 1000
    }
  }
}

/// A thread that can be kept in an array.
final class BenchThread: Sendable {
  private let thread: Mutex<NamedThread?>
  init(_ thread: consuming NamedThread) { self.thread = Mutex(thread) }
  func join() {
    let thread = self.thread.withLock { $0.take() }
    if let thread { thread.join() }
  }
}
