// SPDX-License-Identifier: Apache-2.0

import Foundation

/// The cgroups (version 1) of a round, where it wants some.
public final class ControlGroups: Sendable {
  /// The memory cgroup of the hostile guest.
  let guest: String?
  /// The pids cgroup of the service.
  private let service: String?

  /// Whether this machine has the controllers.
  public static let areAvailable =
    FileManager.default.fileExists(
      atPath: "/sys/fs/cgroup/memory/memory.limit_in_bytes")
    && FileManager.default.fileExists(atPath: "/sys/fs/cgroup/pids/cgroup.procs")

  init(_ surroundings: HostileScenario.Surroundings, service: Int32) throws {
    switch surroundings {
    case .guestMemory(let bytes):
      let group = try Self.make("memory")
      guest = group
      self.service = nil
      // At the limit its threads wait, and are not killed.
      try Self.write("1", group + "/memory.oom_control")
      try Self.write("\(bytes)", group + "/memory.limit_in_bytes")
    case .noThreads:
      let group = try Self.make("pids")
      guest = nil
      self.service = group
      try Self.write("\(service)", group + "/cgroup.procs")
      let threads = try String(contentsOfFile: group + "/pids.current", encoding: .utf8)
      try Self.write(threads, group + "/pids.max")
    case .usual, .descriptors:
      guest = nil
      self.service = nil
    }
  }

  private static func make(_ controller: String) throws -> String {
    let group = "/sys/fs/cgroup/\(controller)/faultline-hostile-\(UUID())"
    try FileManager.default.createDirectory(atPath: group, withIntermediateDirectories: false)
    return group
  }

  private static func write(_ text: String, _ path: String) throws {
    let file = try FileHandle(forWritingTo: URL(fileURLWithPath: path))
    try file.write(contentsOf: Data(text.utf8))
    try file.close()
  }

  /// Lets those that are in them go on without.
  func remove() {
    if let service {
      let parent = "/sys/fs/cgroup/pids/cgroup.procs"
      let processes =
        (try? String(contentsOfFile: service + "/cgroup.procs", encoding: .utf8)) ?? ""
      for process in processes.split(separator: "\n") { try? Self.write(String(process), parent) }
    }
    // rmdir(2): a group's files cannot be removed. Whoever else was in it has ended.
    for group in [guest, service] {
      if let group { _ = waits(seconds: 10) { unsafe rmdir(group) == 0 } }
    }
  }
}
