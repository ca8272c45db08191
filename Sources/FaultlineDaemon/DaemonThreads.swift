// SPDX-License-Identifier: Apache-2.0

internal import Glibc
internal import SystemPackage

/// The threads that do what may wait for somebody, but for the ends of sessions (`Supervisor`).
final class DaemonThreads: Sendable {
  /// Hand-overs that are complete.
  let handovers: Workers
  /// Requests of operators, and for metrics.
  let requests: Workers
  /// Opens images.
  let opens: Workers
  /// Closes what clients sent.
  let closers: Workers

  init() throws(Errno) {
    handovers = try Workers("handover", reserve: 2, limit: 128)
    requests = try Workers("control", reserve: 1, limit: 16)
    opens = try Workers("open", reserve: 1, limit: 128)
    closers = try Workers("close", reserve: 1, limit: 16)
  }

  func stop() {
    for workers in [handovers, requests, opens, closers] { workers.stop(milliseconds: 500) }
  }
}

/// What this process may have.
enum Limits {
  /// Takes as many descriptors as are allowed: a session needs a few.
  static func raiseOpenFiles() {
    var limit = rlimit()
    guard unsafe getrlimit(__rlimit_resource_t(RLIMIT_NOFILE.rawValue), &limit) == 0 else { return }
    limit.rlim_cur = limit.rlim_max
    _ = unsafe setrlimit(__rlimit_resource_t(RLIMIT_NOFILE.rawValue), &limit)
  }

  /// Descriptors for clients that wait: no more than the eighth part of all.
  static func places(_ count: Int) -> Int {
    var limit = rlimit()
    guard unsafe getrlimit(__rlimit_resource_t(RLIMIT_NOFILE.rawValue), &limit) == 0 else {
      return count
    }
    return max(16, min(count, Int(clamping: limit.rlim_cur) / 8))
  }
}
