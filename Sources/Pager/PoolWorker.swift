// SPDX-License-Identifier: Apache-2.0

internal import LinuxSystem
internal import Synchronization

/// What one thread of a pool is at, for the thread that watches it. It is published by atomics:
/// nobody waits for a thread that is stuck.
final class PoolWorker: Sendable {
  /// A turn that is under way.
  struct Turn {
    var place: PoolWatch.Place
    /// CLOCK_MONOTONIC, in nanoseconds. No two turns of a worker begin at the same moment.
    fileprivate(set) var began: UInt64
  }

  /// When the turn began; 0 outside of turns. With the topmost bit the thread was taken for stuck.
  private let began = Atomic<UInt64>(0)
  /// Whose turn it is. Stored before `began`.
  private let place = Atomic<UInt64>(0)
  private let thread = Atomic<Int>(0)
  /// Sessions that have more to do than they were reported for; this thread has them. The lock is
  /// its own until somebody takes them over.
  private let eager = Mutex<[PoolWatch.Place]>([])
  private static var stuckBit: UInt64 { 1 << 63 }

  /// Makes the calling thread its thread.
  func adopt() { thread.store(Int(NamedThread.currentID), ordering: .relaxed) }

  /// Makes room for so many sessions that have more to do.
  func reserve(_ capacity: Int) { eager.withLock { $0.reserveCapacity(capacity) } }

  /// The kernel's id of its thread.
  var threadID: CInt { CInt(thread.load(ordering: .relaxed)) }

  // MARK: - Turns

  func begin(_ place: PoolWatch.Place) {
    self.place.store(place.rawValue, ordering: .relaxed)
    began.store(MonotonicClock.nanoseconds, ordering: .releasing)
  }

  /// - Returns: `false` when the thread was taken for stuck: the session has it from here on.
  func end() -> Bool { began.exchange(0, ordering: .acquiringAndReleasing) & Self.stuckBit == 0 }

  /// The turn that is under way, if it has taken longer than that.
  func turn(longerThan limit: UInt64, at now: UInt64) -> Turn? {
    let began = began.load(ordering: .acquiring)
    guard began > 0, began & Self.stuckBit == 0, now > began, now - began > limit else {
      return nil
    }
    return Turn(place: PoolWatch.Place(rawValue: place.load(ordering: .relaxed)), began: began)
  }

  /// Takes the thread for stuck in that turn; `false` when the turn has come to its end.
  func condemn(_ turn: Turn) -> Bool {
    began.compareExchange(
      expected: turn.began, desired: turn.began | Self.stuckBit, ordering: .acquiringAndReleasing
    ).exchanged
  }

  // MARK: - More to do

  var hasEager: Bool { eager.withLock { !$0.isEmpty } }

  func append(_ place: PoolWatch.Place) { eager.withLock { $0.append(place) } }

  /// The one that has waited longest.
  func nextEager() -> PoolWatch.Place? { eager.withLock { $0.isEmpty ? nil : $0.removeFirst() } }

  /// Takes over what a thread that is stuck had.
  func takeOver(_ other: PoolWorker) {
    let places = other.eager.withLock { places in
      defer { places = [] }
      return places
    }
    eager.withLock { $0.append(contentsOf: places) }
  }
}
