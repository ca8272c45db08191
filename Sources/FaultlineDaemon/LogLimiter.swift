// SPDX-License-Identifier: Apache-2.0

/// How many lines a second there may be: of one session or user, of all of them, and of the
/// service itself, which none of them can use up (token buckets).
struct LogLimiter {
  /// Whose a line is.
  enum Source: Hashable {
    /// The service's own.
    case service
    /// Begins and ends of sessions.
    case lifeCycle
    /// What one session brings about, by its name.
    case session(String)
    /// What a user brings about who has no session.
    case user(String)
    /// Those for whom there is no bucket of their own.
    case others
  }

  private struct Bucket {
    let burst: Double
    let rate: Double
    var tokens: Double
    var time: UInt64
    var leftOut: UInt64 = 0

    init(burst: Double, rate: Double, now: UInt64) {
      (self.burst, self.rate, tokens, time) = (burst, rate, burst, now)
    }

    mutating func fill(_ now: UInt64) {
      guard now > time else { return }
      tokens = min(burst, tokens + Double(now - time) / 1e9 * rate)
      time = now
    }

    var isUnused: Bool { tokens >= burst && leftOut == 0 }
  }

  /// Buckets at a time.
  private static let limit = 4096

  private var buckets: [Source: Bucket] = [:]
  private var total: Bucket
  private var lastPrune: UInt64 = 0
  /// Whether some were left out since `takeLeftOut`.
  private(set) var hasLeftOut = false

  init(now: UInt64) { total = Bucket(burst: 4000, rate: 400, now: now) }

  /// Whether a line of a source may be written; if not, it is counted.
  mutating func admits(_ source: Source, now: UInt64) -> Bool {
    let source = place(of: source, now)
    var bucket = buckets[source] ?? Self.bucket(of: source, now)
    defer { buckets[source] = bucket }
    bucket.fill(now)
    total.fill(now)
    let counts = source != .service && source != .lifeCycle
    guard bucket.tokens >= 1, !counts || total.tokens >= 1 else {
      bucket.leftOut += 1
      hasLeftOut = true
      return false
    }
    bucket.tokens -= 1
    if counts { total.tokens -= 1 }
    return true
  }

  /// How many were left out since the last call, the most first.
  mutating func takeLeftOut() -> [(source: Source, count: UInt64)] {
    hasLeftOut = false
    var found: [(source: Source, count: UInt64)] = []
    for (source, bucket) in buckets where bucket.leftOut > 0 {
      found.append((source, bucket.leftOut))
      buckets[source]?.leftOut = 0
    }
    return found.sorted { $0.count > $1.count }
  }

  private static func bucket(of source: Source, _ now: UInt64) -> Bucket {
    switch source {
    case .service, .others: Bucket(burst: 1000, rate: 100, now: now)
    case .lifeCycle: Bucket(burst: 5000, rate: 200, now: now)
    case .session, .user: Bucket(burst: 50, rate: 10, now: now)
    }
  }

  /// The source itself, or the rest when there is no room for another bucket.
  private mutating func place(of source: Source, _ now: UInt64) -> Source {
    guard buckets[source] == nil, buckets.count >= Self.limit else { return source }
    // Looking through all of them is for once a second.
    if now >= lastPrune + 1_000_000_000 {
      lastPrune = now
      for key in Array(buckets.keys) {
        buckets[key]?.fill(now)
        if buckets[key]?.isUnused == true { buckets[key] = nil }
      }
    }
    return buckets.count < Self.limit ? source : .others
  }
}

extension LogLimiter.Source: CustomStringConvertible {
  var description: String {
    switch self {
    case .service: "the service"
    case .lifeCycle: "begins and ends of sessions"
    case .session(let id): "session \(id)"
    case .user(let number): "user \(number)"
    case .others: "others"
    }
  }
}
