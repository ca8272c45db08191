// SPDX-License-Identifier: Apache-2.0

import Foundation
import TestSupport
import Testing

/// Other circumstances to run `faultline` in, for tests that have the privileges.
enum Surroundings {
  /// The user id of nobody.
  static let nobody: UInt32 = 65534

  /// Runs it as a user without privileges, from a copy that this user can reach.
  static func asNobody(_ arguments: [String]) throws -> Outcome {
    try withTemporaryDirectory { directory in
      try open(directory)
      let copy = "\(directory)/faultline"
      // By another process: while this one had the copy open for writing, a fork of another
      // test would keep it so, and executing it would fail with ETXTBSY.
      let copied = try Command(of: "/bin/cp", [Command.executable, copy]).wait()
      guard copied.ending == .exit(0) else { return copied }
      return try Command(
        of: "/usr/bin/setpriv",
        ["--reuid=\(nobody)", "--regid=\(nobody)", "--clear-groups", copy] + arguments
      ).wait()
    }
  }

  /// Lets every user enter and read a directory.
  static func open(_ directory: String) throws {
    try FileManager.default.setAttributes([.posixPermissions: 0o755], ofItemAtPath: directory)
  }

  /// Runs a shell script with mounts of its own. `$faultline` is the command, and `$dir`
  /// is an empty filesystem of so many KiB that is gone afterwards.
  static func inFilesystem(kibibytes: Int, _ script: String) throws -> Outcome {
    try withTemporaryDirectory { directory in
      try Command(
        of: "/usr/bin/unshare",
        [
          "-m", "sh", "-c",
          "mount -t tmpfs -o size=\(kibibytes)k none \"$dir\" || exit 99\n" + script,
        ],
        environment: ["dir": directory, "faultline": Command.executable]
      ).wait()
    }
  }

  /// Whether `asNobody` can work.
  static let canBeNobody = Host.hasPrivileges && (try? asNobody(["--version"]))?.ending == .exit(0)

  /// Whether `inFilesystem` can work.
  static let canMount =
    Host.hasPrivileges && (try? inFilesystem(kibibytes: 64, "exit 0"))?.ending == .exit(0)

  /// Whether a user without privileges gets a userfaultfd.
  static let nobodyHasUserfaultfd =
    (try? String(contentsOfFile: "/proc/sys/vm/unprivileged_userfaultfd", encoding: .utf8))?
    .hasPrefix("1") == true

  /// What can run a guest here.
  static let guests = Host.hasKVM ? ["process", "kvm"] : ["process"]
}

extension Trait where Self == ConditionTrait {
  /// Needs to become another user.
  static var needsNobody: Self {
    .enabled(if: Surroundings.canBeNobody, "needs root and setpriv(1)")
  }

  /// Needs to mount.
  static var needsMounts: Self {
    .enabled(if: Surroundings.canMount, "needs CAP_SYS_ADMIN and unshare(1)")
  }

  /// Needs /dev/kvm.
  static var needsKVM: Self { .enabled(if: Host.hasKVM, "needs /dev/kvm") }
}

/// The names in a directory.
func names(in directory: String) throws -> [String] {
  try FileManager.default.contentsOfDirectory(atPath: directory).sorted()
}

/// The command lines of the processes that name a path, without `except`.
func processes(naming path: String, except: Int32 = 0) -> [String] {
  let all = (try? FileManager.default.contentsOfDirectory(atPath: "/proc")) ?? []
  return all.compactMap { Int32($0) }.filter { $0 != except }.compactMap { process in
    let line = FileManager.default.contents(atPath: "/proc/\(process)/cmdline") ?? Data()
    let text = String(decoding: line, as: UTF8.self).replacing("\0", with: " ")
    return text.contains(path) ? text : nil
  }
}

/// Whether a process writes a file below a directory that has no name yet.
func writesUnnamedFile(_ process: Int32, below directory: String) -> Bool {
  let folder = "/proc/\(process)/fd"
  let numbers = (try? FileManager.default.contentsOfDirectory(atPath: folder)) ?? []
  return numbers.contains { number in
    let target = try? FileManager.default.destinationOfSymbolicLink(atPath: "\(folder)/\(number)")
    guard let target else { return false }
    return target.hasPrefix(directory) && target.hasSuffix("(deleted)")
  }
}
