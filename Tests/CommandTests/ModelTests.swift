// SPDX-License-Identifier: Apache-2.0

import Foundation
import TestSupport
import Testing

@Suite("faultline model")
struct ModelTests {
  /// In a process of its own: a fork anywhere in this one would change its page tables.
  @Test(
    "The model and the kernel of this machine agree",
    .enabled(if: Host.hasPrivileges, "faults of system calls need root"),
    arguments: ["anonymous", "anonymous-wp-unpopulated", "tmpfs", "tmpfs-private"])
  func agreement(memory: String) throws {
    try check(memory)
  }

  @Test(
    "The model and the kernel of this machine agree on huge pages",
    .enabled(if: Host.hasPrivileges, "faults of system calls need root"),
    .enabled(if: Host.hasHugePages(32), "needs 32 free 2 MiB pages"))
  func agreementOnHugePages() throws {
    try check("hugetlb")
  }

  private struct Line: Decodable {
    let memory: String
    let operations: Int
    let waits: Int
    let differences: Int
  }

  private func check(_ memory: String) throws {
    let operations = memory == "hugetlb" ? 5000 : 20_000
    let outcome = try faultline(
      "model", "check", "--memory", memory, "--operations", "\(operations)", "--json")
    #expect(outcome.ending == .exit(0), "\(outcome)")
    let line: Line = try outcome.json()
    #expect(line.memory == memory)
    #expect(line.operations >= operations)
    #expect(line.waits > operations / 200)
    #expect(line.differences == 0)
  }

  @Test("A script is shown with the state after each step")
  func script() throws {
    try withTemporaryDirectory { directory in
      let path = "\(directory)/scenario.txt"
      try "# one page\n\nregister missing all\nread 1\n".write(
        toFile: path, atomically: true, encoding: .utf8)
      let outcome = try faultline("model", path)
      #expect(outcome.ending == .exit(0), "\(outcome)")
      #expect(outcome.output.contains("> read 1\n  waits: missing event, read of page 1"))
      #expect(outcome.output.contains("MISSING on 0-3"))
    }
  }

  @Test("A script that is not there, and a line that is not understood, are refused")
  func refusals() throws {
    try faultline("model", "run", "/nonexistent/script").expectFailure(
      1, saying: ["/nonexistent/script"])
    try withTemporaryDirectory { directory in
      let path = "\(directory)/scenario.txt"
      try "read 99\n".write(toFile: path, atomically: true, encoding: .utf8)
      let outcome = try faultline("model", path)
      #expect(outcome.ending == .exit(1))
      #expect(outcome.errors.contains("line 1"), "\(outcome)")
    }
    let unknown = try faultline("model", "check", "--memory", "swap")
    #expect(unknown.ending == .exit(64))
  }
}
