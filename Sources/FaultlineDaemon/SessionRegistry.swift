// SPDX-License-Identifier: Apache-2.0

internal import Pager
internal import Synchronization

/// The sessions that there are, and the sums of those that there were.
final class SessionRegistry: Sendable {
  private struct State {
    var sessions: [String: GuestSession] = [:]
    var nextID = 1
    var ended = PagerStatistics()
    var handovers: [String: UInt64] = ["accepted": 0]
  }

  private let state = Mutex(State())

  /// A name for the next session.
  func makeID() -> String {
    state.withLock { state in
      defer { state.nextID += 1 }
      return "\(state.nextID)"
    }
  }

  func add(_ session: GuestSession) { state.withLock { $0.sessions[session.id] = session } }

  /// Takes a session out; its counts stay. `false` when it is not there.
  @discardableResult
  func remove(_ session: GuestSession) -> Bool {
    let statistics = session.pager.statistics
    return state.withLock { state in
      guard state.sessions.removeValue(forKey: session.id) != nil else { return false }
      state.ended.add(statistics)
      return true
    }
  }

  subscript(id: String) -> GuestSession? { state.withLock { $0.sessions[id] } }

  /// The oldest first.
  var all: [GuestSession] {
    state.withLock { Array($0.sessions.values) }.sorted { (Int($0.id) ?? 0) < (Int($1.id) ?? 0) }
  }

  var count: Int { state.withLock { $0.sessions.count } }

  /// Notes how a hand-over ended: "accepted", or a code of docs/handover.md.
  func noteHandover(_ result: String) {
    state.withLock { $0.handovers[result, default: 0] += 1 }
  }

  /// Hand-overs by how they ended.
  var handovers: [String: UInt64] { state.withLock { $0.handovers } }

  /// What all sessions have done, those that have ended too.
  var statistics: PagerStatistics {
    var (total, sessions) = state.withLock { ($0.ended, Array($0.sessions.values)) }
    for session in sessions { total.add(session.pager.statistics) }
    return total
  }
}
