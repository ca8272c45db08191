// SPDX-License-Identifier: Apache-2.0

internal import Pager

/// What the control API answers (docs/control.md).
public enum ControlMessage {
  /// `GET /v1/health`.
  public struct Health: Codable, Sendable {
    /// "ok" or "draining".
    public var status: String
    /// Of the daemon.
    public var version: String
    /// Sessions that are served.
    public var sessions: Int
  }

  /// `GET /v1/sessions`.
  public struct SessionList: Codable, Sendable {
    /// The oldest first.
    public var sessions: [Session]
  }

  /// A session.
  public struct Session: Codable, Sendable {
    /// Its name for requests.
    public var id: String
    /// "serving", "detaching" or "ending".
    public var state: String
    /// What the VMM calls itself.
    public var name: String?
    /// "firecracker" or "faultline".
    public var handover: String
    /// The VMM's process.
    public var processID: Int32
    /// Its user.
    public var userID: UInt32
    /// The image's path.
    public var image: String
    /// Seconds since 1970.
    public var started: Int
    /// Memory that is served.
    public var bytes: Int
    /// Whether it shares its clean pages with other clones of the image.
    public var clone: Bool
    /// Whether first touches are recorded.
    public var records: Bool
    /// Faults so far.
    public var faults: UInt64
    /// Pages without right content.
    public var failedPages: UInt64
    /// Pages that wait for storage.
    public var pendingReads: Int
    /// The filling in the background.
    public var fill: Fill
    /// Every counter; not in lists.
    public var statistics: [String: UInt64]?

    // Snake case makes process_id of these, and these of process_id.
    enum CodingKeys: String, CodingKey {
      case id, state, name, handover, image, started, bytes, clone, records, faults
      case failedPages, pendingReads, fill, statistics
      case processID = "processId"
      case userID = "userId"
    }
  }

  /// The filling in the background.
  public struct Fill: Codable, Sendable {
    /// "idle", "replaying", "filling" or "done".
    public var phase: String
    /// Bytes that were looked at.
    public var done: Int
    /// Bytes that are to be.
    public var total: Int
  }

  /// The body of `POST …/fill`.
  public struct FillRequest: Codable, Sendable {
    /// Bytes a second; `nil` for no limit.
    public var rate: Int?
  }

  /// `GET …/working-set`.
  public struct WorkingSetList: Codable, Sendable {
    /// In the order of first touches.
    public var runs: [Run]
  }

  /// Blocks of 4 KiB that were touched one after the other.
  public struct Run: Codable, Sendable {
    /// Of the image.
    public var region: Int
    /// In the region.
    public var firstBlock: Int
    /// How many.
    public var blockCount: Int
  }

  /// Why a request was not done.
  public struct Failure: Codable, Sendable {
    /// In words.
    public var error: String
  }
}

extension PagerStatistics {
  /// Every counter by its name in docs/control.md.
  var named: [String: UInt64] {
    [
      "missing_faults": missingFaults, "minor_faults": minorFaults,
      "copied_pages": copiedPages, "continued_pages": continuedPages, "zero_pages": zeroPages,
      "coalesced_faults": coalescedFaults, "deferred_faults": deferredFaults,
      "already_present": alreadyPresent, "retries": retries, "remove_events": removeEvents,
      "unmap_events": unmapEvents, "remap_events": remapEvents, "fork_events": forkEvents,
      "failed_pages": failedPages, "brought_along": broughtAlong, "populated_pages": populatedPages,
      "service_time_p50_nanoseconds": serviceTime.quantile(0.5) ?? 0,
      "service_time_p99_nanoseconds": serviceTime.quantile(0.99) ?? 0,
    ]
  }
}
