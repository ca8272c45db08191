// SPDX-License-Identifier: Apache-2.0

public import Foundation

/// A guest that reads, writes and gives back at random, and knows what has to be in each block of
/// 4 KiB; beside hostile ones.
public struct HostileSoak: Sendable {
  /// What the guest's memory is.
  public enum Memory: String, Sendable, CaseIterable {
    /// As Firecracker has it with huge pages: private, not reserved, from a pool that is empty now and
    /// then.
    case unreservedHugePages = "huge-unreserved"
    /// A file of huge pages, mapped shared; MADV_REMOVE of parts of pages.
    case sharedHugePages = "huge-shared"
    /// Anonymous pages of 4 KiB.
    case smallPages = "small"
    /// A file on tmpfs.
    case sharedSmallPages = "small-shared"
    /// Huge pages, and each memory is where the last one was.
    case reusedAddresses = "reused"

    /// Whether it needs huge pages, and root for a pool of its own.
    public var needs: [HostileScenario.Need] {
      switch self {
      case .unreservedHugePages: [.hugePages, .root]
      case .sharedHugePages, .reusedAddresses: [.hugePages]
      case .smallPages, .sharedSmallPages: []
      }
    }

    fileprivate var words: [String] {
      switch self {
      case .unreservedHugePages:
        ["protocol=firecracker", "page-size=2097152", "pages=8", "other=pool", "pause-us=20000"]
      case .sharedHugePages: ["protocol=minor", "page-size=2097152", "pages=8"]
      case .reusedAddresses:
        ["protocol=missing", "page-size=2097152", "pages=8", "reuses=1"]
      case .smallPages: ["protocol=firecracker", "pages=4096"]
      case .sharedSmallPages: ["protocol=minor", "pages=4096"]
      }
    }
  }

  private let memory: Memory
  private let operations: Int
  private let command: URL

  /// A guest with one kind of memory.
  ///
  /// - Parameter command: the executable `faultline`.
  public init(_ memory: Memory, operations: Int, command: URL) {
    self.memory = memory
    self.operations = operations
    self.command = command
  }

  /// What the guest counted, and how the service ended.
  public func run() throws -> (guest: GuestReport, violations: [String]) {
    let directory = FileManager.default.temporaryDirectory.path + "/faultline-soak-\(UUID())"
    try FileManager.default.createDirectory(atPath: directory, withIntermediateDirectories: false)
    defer { try? FileManager.default.removeItem(atPath: directory) }
    // The rest is filled meanwhile, so that this is met as well.
    let service = try ObservedService(command, in: directory, settings: ["fill-rate: 8M"])
    let socket =
      memory.words.contains("protocol=firecracker")
      ? service.firecrackerSocket : service.handoverSocket
    // Slow enough to leave the guest a processor, for as long as it takes.
    let hostile = try RoleProcess(
      command, in: directory, "storm",
      [
        "socket=\(service.firecrackerSocket)", "protocol=firecracker", "piece=65536",
        "pause-us=1000", "threads=1", "milliseconds=86400000",
      ])
    let guest = try RoleProcess(
      command, in: directory, "soak",
      memory.words + ["socket=\(socket)", "threads=2", "operations=\(operations)", "seed=\(seed)"])
    let report = guest.report(within: 60 + Double(operations) / 50)
    hostile.kill()
    var violations: [String] = []
    if report.status != 0 || report["wrong"] != 0 {
      violations.append(
        "seed \(seed), exit status \(report.status): \(report["wrong"]) wrong, \(report["errors"]) errors, "
          + "\(report["stuck"]) stuck: \(report.words.prefix(1000))")
    }
    if !service.isRunning {
      violations.append("the service ended: \(service.messages.suffix(500))")
    }
    return (report, violations)
  }

  private let seed = UInt32.random(in: 1...UInt32.max)
}
