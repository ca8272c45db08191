// SPDX-License-Identifier: Apache-2.0

package import Foundation
package import GuestMemory
import LinuxSystem
package import Pager
import Synchronization
package import Userfault

/// What this machine has, for tests that need it.
package enum Host {
  /// Whether the free pages of the 2 MiB pool suffice.
  package static func hasHugePages(_ count: Int) -> Bool {
    let path = "/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages"
    guard let text = try? String(contentsOfFile: path, encoding: .utf8) else { return false }
    return (Int(text.trimmingCharacters(in: .whitespacesAndNewlines)) ?? 0) >= count
  }

  /// Whether this process may watch faults that come from the kernel.
  package static let hasPrivileges = getuid() == 0

  /// Threads of this process.
  package static func threadCount() throws -> Int {
    try FileManager.default.contentsOfDirectory(atPath: "/proc/self/task").count
  }

  /// All of a file of /proc: `String(contentsOfFile:)` stops after the first part of a long one.
  package static func processFile(_ name: String) throws -> String {
    let file = try FileHandle(forReadingFrom: URL(fileURLWithPath: "/proc/self/\(name)"))
    return String(decoding: try file.readToEnd() ?? Data(), as: UTF8.self)
  }

  /// Threads of this process with a name.
  package static func threads(named name: String) -> Int {
    let tasks = (try? FileManager.default.contentsOfDirectory(atPath: "/proc/self/task")) ?? []
    return tasks.count { task in
      (try? String(contentsOfFile: "/proc/self/task/\(task)/comm", encoding: .utf8)) == name + "\n"
    }
  }

  /// Whether the kernel's userfaultfd has a feature.
  package static func has(_ feature: UserfaultFeatures) -> Bool {
    (try? Userfaultfd.supportedFeatures().isSuperset(of: feature)) ?? false
  }

  /// Whether KVM can be used.
  package static let hasKVM = unsafe access("/dev/kvm", R_OK | W_OK) == 0
}

/// How many descriptors this process has open. Only meaningful in a process that does
/// nothing else: use it in an exit test.
package func openDescriptorCount() -> Int {
  (try? FileManager.default.contentsOfDirectory(atPath: "/proc/self/fd").count) ?? -1
}

/// Descriptors whose link in /proc/self/fd contains a text.
package func openDescriptors(of text: String) -> Int {
  let numbers = (try? FileManager.default.contentsOfDirectory(atPath: "/proc/self/fd")) ?? []
  return numbers.count { number in
    let link = try? FileManager.default.destinationOfSymbolicLink(atPath: "/proc/self/fd/\(number)")
    return link?.contains(text) == true
  }
}

/// Starts a process. One at a time: Foundation learns of its end by a socket that it opens just
/// before, and another process that is started at that moment would keep it open. So would
/// the backtracer of a process that crashes and is killed meanwhile, for ever: without one.
package func launch(_ process: Process) throws {
  process.environment = (process.environment ?? ProcessInfo.processInfo.environment)
    .merging(["SWIFT_BACKTRACE": "enable=no"]) { $1 }
  try launching.withLock { _ in try process.run() }
}

private let launching = Mutex(())

/// Runs a body with a fresh directory and removes it afterwards.
package func withTemporaryDirectory<Value>(_ body: (String) throws -> Value) throws -> Value {
  let path = FileManager.default.temporaryDirectory.appendingPathComponent(
    "faultline-\(UUID().uuidString)"
  ).path
  try FileManager.default.createDirectory(atPath: path, withIntermediateDirectories: false)
  defer { try? FileManager.default.removeItem(atPath: path) }
  return try body(path)
}

/// A kind of memory together with a way to fill it.
package struct MemoryCase: Sendable, CustomStringConvertible {
  package let backing: MemoryBacking
  package let mode: ResolutionMode
  package var description: String { "\(backing)/\(mode.rawValue)" }

  /// Every combination that the kernel offers.
  package static let all = [
    MemoryCase(backing: .anonymous, mode: .missing),
    MemoryCase(backing: .memfd, mode: .missing),
    MemoryCase(backing: .memfd, mode: .minor),
    MemoryCase(backing: .hugetlb(.size2MiB), mode: .missing),
    MemoryCase(backing: .hugetlb(.size2MiB), mode: .minor),
  ]

  /// The same without huge pages.
  package static let smallPages = all.filter { $0.backing.pageSize == .size4KiB }

  /// Shared small pages only.
  package static let memfd = all.filter { $0.backing == .memfd }

  /// Pages for a test that wants about `count`: huge pages are scarce.
  package func pages(_ count: Int) -> Int { backing.pageSize == .size4KiB ? count : 4 }
}

/// Processor time of this process, in seconds.
package func processorTime() -> Double {
  var time = timespec()
  unsafe clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &time)
  return Double(time.tv_sec) + Double(time.tv_nsec) / 1e9
}
