// SPDX-License-Identifier: Apache-2.0

import Foundation
import TestSupport
import Testing

@Suite("demo and bench")
struct DemoTests {
  @Test(
    "The demo ends with the verdict and leaves nothing",
    arguments: Surroundings.guests.map { ($0, []) }
      + [("process", ["--backing", "memfd", "--faults", "minor"])])
  func demo(_ guest: String, _ memory: [String]) throws {
    try withTemporaryDirectory { directory in
      let outcome = try faultline(
        ["demo", "--memory", "16M", "--guest", guest, "--directory", directory] + memory)
      #expect(outcome.ending == .exit(0), "\(outcome)")
      #expect(outcome.errors.isEmpty)
      #expect(outcome.output.contains("(\(guest))"))
      #expect(outcome.lines.last == "guest verified: 3840 pages, 0 wrong")
      #expect(try names(in: directory).isEmpty)
      #expect(processes(naming: directory).isEmpty)
    }
  }

  @Test("A demo in a directory that does not exist says so, and only so")
  func demoNowhere() throws {
    try withTemporaryDirectory { directory in
      let nowhere = "\(directory)/nowhere"
      try faultline("demo", "--memory", "16M", "--guest", "process", "--directory", nowhere)
        .expectFailure(1, saying: [nowhere])
    }
  }

  @Test("The demo on a full disk fails with the reason and leaves nothing", .needsMounts)
  func demoOnFullDisk() throws {
    let outcome = try Surroundings.inFilesystem(
      kibibytes: 4096,
      """
      "$faultline" demo --memory 16M --guest process --directory "$dir"
      echo "status $?"
      ls -A "$dir"
      """)
    #expect(outcome.lines.last == "status 1", "\(outcome)")
    #expect(outcome.errors.contains("No space left on device"))
  }

  @Test(
    "Each line of the benchmark is one object with the same keys, and no image is left",
    .timeLimit(.minutes(10)))
  func bench() async throws {
    let directory = FileManager.default.temporaryDirectory.appendingPathComponent(
      "faultline-bench-\(UUID().uuidString)"
    ).path
    try FileManager.default.createDirectory(
      atPath: directory, withIntermediateDirectories: false)
    defer { try? FileManager.default.removeItem(atPath: directory) }
    // The lines for KVM are like the others and take as long again: without, if possible.
    let withoutKVM = Host.hasKVM && Surroundings.canMount
    let script =
      (withoutKVM ? "mount --bind /dev/null /dev/kvm && " : "")
      + "exec \"$faultline\" bench fault --rounds 1 --json"
    let command = try Command(
      of: "/usr/bin/env", (withoutKVM ? ["unshare", "-m"] : []) + ["sh", "-c", script],
      environment: ["TMPDIR": directory, "faultline": Command.executable])
    // It sleeps between isolated faults; other tests can run.
    while command.isRunning { try await Task.sleep(for: .milliseconds(50)) }
    let outcome = try command.wait()
    #expect([.exit(0), .exit(1)].contains(outcome.ending), "\(outcome)")
    #expect(outcome.errors.isEmpty)
    #expect(try names(in: directory).isEmpty)
    #expect(outcome.lines.count >= (withoutKVM ? 1 : Surroundings.guests.count) * 10)
    var allMet = true
    for line in outcome.lines {
      let fields = try JSONDecoder().decode([String: Scalar].self, from: Data(line.utf8))
      let keys = Set(fields.keys)
      #expect(
        keys.isSuperset(of: ["name", "unit", "ours", "peer", "ratio", "goal", "met", "rounds"]),
        "\(line)")
      #expect(fields["rounds"] == .number(1))
      guard case .flag(let met) = fields["met"], case .number(let ours) = fields["ours"] else {
        Issue.record("met or ours has the wrong type: \(line)")
        continue
      }
      #expect(ours > 0)
      allMet = allMet && met
    }
    #expect(outcome.ending == .exit(allMet ? 0 : 1))
  }
}
