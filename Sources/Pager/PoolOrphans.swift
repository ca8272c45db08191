// SPDX-License-Identifier: Apache-2.0

internal import LinuxSystem

/// Sessions of a pool whose process is gone: it may have handed over the memory of another one, which
/// a userfaultfd tells nobody the end of. So they are asked once a second whether it is still there.
/// The question takes a lock of the address space: a thread of its own asks (`poolcheck`).
final class PoolOrphans: Sendable {
  private struct State {
    /// In the order in which they are due.
    var places: [(place: PoolWatch.Place, due: UInt64)] = []
    var isStopping = false
  }

  private let state = Monitor(State())
  /// Between two questions, in nanoseconds.
  static var interval: UInt64 { 1_000_000_000 }

  /// Has a session asked at once, before all others.
  func add(_ place: PoolWatch.Place) {
    state.withLock { $0.places.insert((place, 0), at: 0) }
  }

  /// Has it asked again after a while.
  func addAgain(_ place: PoolWatch.Place) {
    let due = MonotonicClock.nanoseconds &+ Self.interval
    state.withLock { $0.places.append((place, due)) }
  }

  func stop() { state.withLock { $0.isStopping = true } }

  private enum Next { case place(PoolWatch.Place), end }

  /// Waits for the next that is due; `nil` at the end.
  func next() -> PoolWatch.Place? {
    while true {
      let first = state.wait { state -> UInt64? in
        if state.isStopping { return 0 }
        return state.places.first?.due
      }
      let next = state.wait(until: max(first, 1)) { state -> Next? in
        if state.isStopping { return .end }
        guard let first = state.places.first, first.due <= MonotonicClock.nanoseconds else {
          return nil
        }
        return .place(state.places.removeFirst().place)
      }
      switch next {
      case .place(let place): return place
      case .end: return nil
      case nil: break
      }
    }
  }
}

extension PoolWatch {
  /// Asks those whose process is gone, until the pool ends, or the thread was taken for stuck.
  func check(_ worker: PoolWorker) {
    while let place = orphans.next() {
      worker.begin(place)
      let isThere = ask(place)
      let isShared = worker.end()
      if isThere { orphans.addAgain(place) }
      guard isShared else { return rejoin(place) }
    }
  }

  /// Whether a session is there and has its memory; one that has not ends.
  func ask(_ place: Place) -> Bool {
    guard let guest = guest(at: place, alsoApart: true) else { return false }
    if guest.hasMemory { return true }
    guest.processHasEnded()
    return false
  }
}
