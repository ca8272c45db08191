// SPDX-License-Identifier: Apache-2.0

internal import Foundation
internal import Glibc

/// How much memory this process can have.
enum MemoryLimit {
  /// Bytes: the machine's, or the limit of the memory cgroup that the process is in, of either
  /// version (cgroups(7)).
  static var bytes: Int {
    let machine = sysconf(CInt(_SC_PHYS_PAGES)) * sysconf(CInt(_SC_PAGESIZE))
    return min(machine, groupLimit ?? machine)
  }

  private static var groupLimit: Int? {
    guard let groups = try? String(contentsOfFile: "/proc/self/cgroup", encoding: .utf8) else {
      return nil
    }
    for line in groups.split(separator: "\n") {
      // hierarchy:controllers:path
      let fields = line.split(separator: ":", maxSplits: 2, omittingEmptySubsequences: false)
      guard fields.count == 3 else { continue }
      let file: String
      if fields[1].split(separator: ",").contains("memory") {
        file = "/sys/fs/cgroup/memory\(fields[2])/memory.limit_in_bytes"
      } else if fields[1].isEmpty {
        file = "/sys/fs/cgroup\(fields[2])/memory.max"
      } else {
        continue
      }
      guard let text = try? String(contentsOfFile: file, encoding: .utf8) else { continue }
      // "max" is none.
      if let limit = Int(text.trimmingCharacters(in: .whitespacesAndNewlines)), limit > 0 {
        return limit
      }
    }
    return nil
  }
}
