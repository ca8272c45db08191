// SPDX-License-Identifier: Apache-2.0

import TestSupport
import Testing

@Suite("The command line")
struct UsageTests {
  static let verbs = ["doctor", "demo", "snapshot", "restore", "bench", "image", "model"]

  @Test("The help names every verb, the exit statuses and the completions")
  func help() throws {
    let outcome = try faultline("--help")
    #expect(outcome.ending == .exit(0))
    #expect(outcome.errors.isEmpty)
    for verb in Self.verbs {
      #expect(outcome.output.contains("faultline \(verb)"))
    }
    #expect(outcome.output.contains("Exit status"))
    #expect(outcome.output.contains("--generate-completion-script"))
  }

  @Test("Without arguments it shows the help")
  func nothing() throws {
    let outcome = try faultline()
    #expect(outcome.ending == .exit(0))
    #expect(outcome.output == (try faultline("--help").output))
  }

  @Test("Each verb has help with an example, and the same in both ways", arguments: verbs)
  func verbHelp(_ verb: String) throws {
    let outcome = try faultline("help", verb)
    #expect(outcome.ending == .exit(0))
    #expect(outcome.errors.isEmpty)
    #expect(outcome.output.contains("USAGE: faultline \(verb)"))
    #expect(outcome.output.contains("\nfaultline \(verb)"), "no example")
    #expect(outcome.output == (try faultline(verb, "--help").output))
  }

  @Test("The help of restore lists every option with its values")
  func restoreHelp() throws {
    let text = try faultline("help", "restore").output
    for word in [
      "--strategy", "lazy", "eager", "--faults", "missing", "minor", "--backing", "anonymous",
      "memfd", "hugetlb-2M", "--workload", "verify", "touch", "--order", "sequential", "random",
      "--fault-threads", "--source-timeout", "--on-damage", "stop-vmm", "--handover", "--json",
    ] {
      #expect(text.contains(word))
    }
  }

  @Test("The version is one line")
  func version() throws {
    let outcome = try faultline("--version")
    #expect(outcome.ending == .exit(0))
    #expect(outcome.errors.isEmpty)
    #expect(outcome.output.wholeMatch(of: /faultline \d+\.\d+\.\d+\n/) != nil)
  }

  @Test("There are completions for each shell", arguments: ["bash", "zsh", "fish"])
  func completions(_ shell: String) throws {
    let outcome = try faultline("--generate-completion-script", shell)
    #expect(outcome.ending == .exit(0))
    #expect(outcome.errors.isEmpty)
    for word in Self.verbs + ["hugetlb-2M", "workload"] {
      let offers = outcome.output.contains(word)
      #expect(offers, "\(word)")
    }
  }

  @Test(
    "Wrong usage exits with 64 and says what is wrong, on standard error only",
    arguments: [
      (["frobnicate"], "frobnicate"),
      (["--frobnicate"], "--frobnicate"),
      (["snapshot"], "--output"),
      (["snapshot", "--memory", "8M"], "--output"),
      (["snapshot", "-o"], "-o"),
      (["snapshot", "-o", "x", "y"], "y"),
      (["snapshot", "-o", "x", "--memory", "3M"], "--memory"),
      (["snapshot", "-o", "x", "--memory", "0"], "--memory"),
      (["snapshot", "-o", "x", "--memory", "abc"], "--memory"),
      (["snapshot", "-o", "x", "--memory", "-8M"], "--memory"),
      (["snapshot", "-o", "x", "--memory", "128G"], "--memory"),
      (["snapshot", "-o", "x", "--memory", "99999999999999999999G"], "--memory"),
      (["snapshot", "-o", "x", "--vcpus", "0"], "--vcpus"),
      (["snapshot", "-o", "x", "--vcpus", "65"], "--vcpus"),
      (["snapshot", "-o", "x", "--seed", "-1"], "--seed"),
      (["snapshot", "-o", "x", "--guest", "qemu"], "--guest"),
      (["snapshot", "-o", "x", "--backing", "paper"], "--backing"),
      (["restore"], "<image>"),
      (["restore", "x", "--faults", "major"], "--faults"),
      (["restore", "x", "--strategy", "hope"], "--strategy"),
      (["restore", "x", "--workload", "sleep"], "--workload"),
      (["restore", "x", "--order", "none"], "--order"),
      (["restore", "x", "--fault-threads", "0"], "--fault-threads"),
      (["restore", "x", "--source-timeout", "30"], "--source-timeout"),
      (["restore", "x", "--source-timeout", "99ms"], "--source-timeout"),
      (["restore", "x", "--source-timeout", "61m"], "--source-timeout"),
      (["restore", "x", "--on-damage", "panic"], "--on-damage"),
      (["restore", "x", "--on-damage", "wait", "--backing", "guest_memfd"], "--on-damage"),
      (["restore", "x", "--handover", "s", "--on-damage", "wait"], "--on-damage"),
      (["restore", "x", "--handover", "s", "--source-timeout", "1s"], "--source-timeout"),
      (["restore", "x", "--name", "vm"], "--handover"),
      (["restore", "x", "--service-image", "a"], "--handover"),
      (["restore", "x", "--handover", "s", "--strategy", "eager"], "--strategy eager"),
      (["restore", "x", "--handover", "s", "--record"], "--record"),
      (["restore", "x", "--handover", "s", "--fault-threads", "2"], "--fault-threads"),
      (["restore", "x", "--handover", "s", "--fault-around", "0"], "--fault-around"),
      (["restore", "x", "--handover", "s", "--no-working-set"], "--no-working-set"),
      (["restore", "x", "--handover", "s", "--backing", "hugetlb-1G"], "hugetlb-2M"),
      (["restore", "x", "--handover", "s", "--backing", "guest_memfd"], "hugetlb-2M"),
      (["demo", "--memory", "3M"], "--memory"),
      (["demo", "--memory", "1"], "--memory"),
      (["demo", "--vcpus", "0"], "--vcpus"),
      (["bench"], "<name>"),
      (["bench", "nothing"], "nothing"),
      (["bench", "fault", "--rounds", "0"], "--rounds"),
    ])
  func wrongUsage(_ arguments: [String], _ word: String) throws {
    let outcome = try faultline(arguments)
    outcome.expectFailure(64, saying: [word, "Usage: faultline", "--help"])
  }
}
