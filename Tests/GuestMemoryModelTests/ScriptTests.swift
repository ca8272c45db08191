// SPDX-License-Identifier: Apache-2.0

import Foundation
import GuestMemoryModel
import Testing

/// The script language, and the document that is written in it.
struct ScriptTests {
  private func outcome(of script: String) throws -> [String] {
    var session = ModelSession()
    var last: [String] = []
    for line in script.split(separator: "\n", omittingEmptySubsequences: false) {
      let shown = try session.take(String(line))
      if !shown.isEmpty { last = shown }
    }
    return last
  }

  @Test(arguments: [
    ("register minor all\nfallocate 0\nread 0\ncontinue 0", "woken: content 0"),
    ("memory tmpfs\nregister minor all\npwrite 1 5\nread 1 # waits\nwake 1", "woken: waits"),
    ("register missing+minor+wp 0-2 @1\nread 0\nread 0 @1", "waits: minor event"),
    ("memory anonymous\nregister missing all\nread 3\nzeropage all", "woken: content 0"),
    ("copy 0 7 dontwake", "ENOENT"),
    ("register missing+wp all\ncopy 0 7 wp dontwake\nwrite 0 9", "write-protect event"),
    ("bit 1 on\nvcpu write 1 6", "KVM_EXIT_MEMORY_FAULT"),
    ("pages 16\npwrite 0-15\npunch 3\nvcpu read 15", "content 115"),
    ("memory hugetlb\nkernel 6.18\npwrite 0 1", "EINVAL"),
  ])
  func aScriptDoesWhatItsStepsSay(script: String, expected: String) throws {
    let shown = try outcome(of: script)
    #expect(shown.prefix(2).contains { $0.contains(expected) }, "\(shown)")
  }

  @Test(arguments: [
    ("read", "page is missing"), ("read 9", "from 0 to 4"), ("read 1-2", "one page"),
    ("read -1", "from 0 to 4"), ("read 3-1", "from 0 to 4"), ("read 0-", "from 0 to 4"),
    ("read 99999999999999999999", "from 0 to 4"), ("read 0 @2", "@0 to @1"),
    ("read 0 @", "@0 to @1"), ("read 0 now", "too much"), ("register foo all", "no mode"),
    ("register all", "no mode"), ("vcpu jump 1", "read or write"), ("bit 1 maybe", "on nor off"),
    ("bit 0-1 on", "one page"), ("pwrite 4", "from 0 to 3"), ("pwrite 0 99999999999", "2^32"),
    ("pwrite 0 readable x", "not a number"), ("memory swap", "there are anonymous"),
    ("kernel 2.4", "there are 6.18"), ("pages 0", "1 to 16"), ("pages 17", "1 to 16"),
    ("jump", "no step"),
  ])
  func aLineThatCannotBeUnderstoodIsRefusedByNumberAndReason(line: String, reason: String) {
    var session = ModelSession()
    #expect(throws: Never.self) { try session.take("# a comment") }
    let error = #expect(throws: ModelScriptError.self) { try session.take(line) }
    #expect(error?.line == 2)
    #expect(error?.reason.contains(reason) == true, "\(String(describing: error))")
  }

  @Test func theSceneIsFixedByTheFirstStep() throws {
    var session = ModelSession()
    _ = try session.take("read 0")
    let error = #expect(throws: ModelScriptError.self) { try session.take("pages 2") }
    #expect(error?.reason == "pages comes before the first step")
  }

  @Test func randomLinesAreRefusedOrTakenAndNeverTrap() {
    let words = [
      "register", "missing", "minor", "+", "wp", "all", "0-3", "4", "@1", "copy", "pwrite", "vcpu",
      "read", "write", "bit", "on", "readable", "punch", "fallocate", "-", "",
      "18446744073709551615",
      "memory", "hugetlb", "kernel", "7.3", "pages", "2", "dontneed", "protect", "continue", "#",
    ]
    var generator = SplitMix(state: 42)
    for _ in 0..<2000 {
      var session = ModelSession()
      for _ in 0..<8 {
        let line = (0..<Int.random(in: 0...4, using: &generator))
          .map { _ in words.randomElement(using: &generator) ?? "" }.joined(separator: " ")
        if let shown = try? session.take(line) { #expect(shown.allSatisfy { $0.count < 400 }) }
      }
    }
  }

  @Test func theDocumentShowsWhatTheModelSays() throws {
    let path = URL(fileURLWithPath: #filePath).deletingLastPathComponent()
      .appendingPathComponent("../../docs/semantics.md")
    let text = try String(contentsOf: path, encoding: .utf8)
    let blocks = text.components(separatedBy: "```text\n").dropFirst()
      .compactMap { $0.components(separatedBy: "```").first }
    #expect(blocks.count >= 12)
    for block in blocks {
      var session = ModelSession()
      var expected: [String] = []
      for line in block.split(separator: "\n") where line.hasPrefix("> ") {
        expected.append(String(line))
        expected += try session.take(String(line.dropFirst(2)))
      }
      #expect(
        block == expected.map { $0 + "\n" }.joined(),
        "docs/semantics.md is out of date: run scripts/update-semantics.sh")
    }
  }
}

/// Random numbers that are the same in every run.
private struct SplitMix: RandomNumberGenerator {
  var state: UInt64
  mutating func next() -> UInt64 {
    state &+= 0x9E37_79B9_7F4A_7C15
    var mixed = state
    mixed = (mixed ^ mixed >> 30) &* 0xBF58_476D_1CE4_E5B9
    mixed = (mixed ^ mixed >> 27) &* 0x94D0_49BB_1331_11EB
    return mixed ^ mixed >> 31
  }
}
