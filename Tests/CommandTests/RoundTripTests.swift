// SPDX-License-Identifier: Apache-2.0

import TestSupport
import Testing

@Suite("snapshot, then restore")
struct RoundTripTests {
  static let orders = ["sequential", "random"]

  /// Restores one image in each order of the guest's pages.
  private func verify(_ guest: String, _ backing: String, _ faults: String) throws {
    try withImage(guest: guest) { image in
      for order in Self.orders {
        let outcome = try image.restore(
          "--json", "--backing", backing, "--faults", faults, "--order", order)
        #expect(outcome.ending == .exit(0), "\(outcome)")
        #expect(outcome.errors.isEmpty)
        let restored: Restored = try outcome.json()
        #expect(restored.wrongPages == 0)
        #expect(restored.verifiedPages == image.guestPages)
        #expect(restored.faults > 0)
        #expect(restored.failedPages == 0)
        #expect(restored.damagedPages.isEmpty)
        #expect(restored.guestError == nil)
        #expect(restored.guest == guest)
        #expect(restored.backing == backing)
        #expect(restored.faultMode == faults)
        #expect(restored.memoryBytes == image.mebibytes << 20)
        #expect((faults == "minor" ? restored.continuedPages : restored.copiedPages) > 0)
        #expect(restored.firstInstructionNanoseconds > 0)
        #expect(restored.firstInstructionNanoseconds < restored.doneNanoseconds)
      }
      #expect(try names(in: image.directory) == ["guest.img"])
    }
  }

  @Test(
    "Every page is right, in each order", arguments: Surroundings.guests,
    [("anonymous", "missing"), ("memfd", "missing"), ("memfd", "minor")])
  func everyPage(_ guest: String, _ memory: (backing: String, faults: String)) throws {
    try verify(guest, memory.backing, memory.faults)
  }

  @Test(
    "Every page is right in huge pages",
    .enabled(if: Host.hasHugePages(16), "needs 16 free pages of 2 MiB"),
    arguments: Surroundings.guests)
  func hugePages(_ guest: String) throws {
    try verify(guest, "hugetlb-2M", "minor")
  }

  @Test("The text for people ends with the verdict", arguments: Surroundings.guests)
  func humanOutput(_ guest: String) throws {
    try withImage(guest: guest) { image in
      let outcome = try image.restore()
      #expect(outcome.ending == .exit(0))
      #expect(outcome.errors.isEmpty)
      #expect(outcome.lines.first?.contains("lazy restore of \(image.path): 8.0 MiB") == true)
      #expect(outcome.output.contains("\(guest), 1 vCPU\n"))
      #expect(outcome.lines.last == "guest verified: \(image.guestPages) pages, 0 wrong")
    }
  }

  @Test(
    "Eager: all stored pages are there before the guest runs", arguments: Surroundings.guests,
    [("anonymous", "missing"), ("memfd", "minor")])
  func eager(_ guest: String, _ memory: (backing: String, faults: String)) throws {
    try withImage(guest: guest) { image in
      let outcome = try image.restore(
        "--json", "--strategy", "eager", "--backing", memory.backing, "--faults", memory.faults)
      #expect(outcome.ending == .exit(0), "\(outcome)")
      let restored: Restored = try outcome.json()
      #expect(restored.strategy == "eager")
      #expect(restored.wrongPages == 0)
      #expect(restored.verifiedPages == image.guestPages)
      #expect(restored.populatedPages > 0)
      #expect(restored.copiedPages + restored.continuedPages == restored.populatedPages)
      let lazy: Restored = try image.restore("--json", "--fault-around", "0").json()
      #expect(lazy.populatedPages == 0)
      #expect(restored.faults < lazy.faults)
    }
  }

  @Test("touch touches every page once, and times it", arguments: orders)
  func touch(_ order: String) throws {
    try withImage { image in
      let outcome = try image.restore(
        "--json", "--workload", "touch", "--order", order, "--fault-around", "0")
      #expect(outcome.ending == .exit(0), "\(outcome)")
      let restored: Restored = try outcome.json()
      #expect(restored.touchedPages == image.guestPages)
      #expect(restored.faults >= image.guestPages)
      #expect((restored.touchP50Nanoseconds ?? 0) > 0)
      #expect(restored.verifiedPages == nil)
    }
  }

  @Test("What was recorded comes before it is touched", arguments: Surroundings.guests)
  func workingSet(_ guest: String) throws {
    try withImage(guest: guest) { image in
      let recorded = try image.restore("--record", "--order", "random")
      #expect(recorded.ending == .exit(0), "\(recorded)")
      #expect(recorded.output.contains("pages recorded"))
      #expect(try faultline("image", "info", image.path).output.contains("working set"))
      let restored: Restored = try image.restore("--json", "--order", "random").json()
      #expect(restored.wrongPages == 0)
      #expect(restored.populatedPages > 0)
      let without: Restored = try image.restore(
        "--json", "--order", "random", "--no-working-set", "--fault-around", "0"
      ).json()
      #expect(without.populatedPages == 0)
      #expect(without.wrongPages == 0)
    }
  }

  @Test("A guest without work runs, and asks for next to nothing", arguments: Surroundings.guests)
  func noWork(_ guest: String) throws {
    try withImage(guest: guest) { image in
      let outcome = try image.restore("--json", "--workload", "none")
      #expect(outcome.ending == .exit(0), "\(outcome)")
      let restored: Restored = try outcome.json()
      #expect(restored.verifiedPages == nil)
      #expect(restored.faults < 64)
      #expect(restored.firstInstructionNanoseconds > 0)
    }
  }

  @Test("Two vCPUs share the work, with several fault threads", arguments: Surroundings.guests)
  func twoVCPUs(_ guest: String) throws {
    try withImage(guest: guest, ["--vcpus", "2"]) { image in
      for options in [["--order", "random"], ["--fault-threads", "4"]] {
        let outcome = try faultline(["restore", image.path, "--json"] + options)
        #expect(outcome.ending == .exit(0), "\(outcome)")
        let restored: Restored = try outcome.json()
        #expect(restored.vcpus == 2)
        #expect(restored.wrongPages == 0)
        #expect(restored.verifiedPages == image.guestPages)
      }
    }
  }

  @Test("A guest that was filled in part verifies that part, and its image is smaller")
  func partlyFilled() throws {
    try withImage(mebibytes: 32, ["--fill", "2M", "--seed", "42"]) { image in
      let restored: Restored = try image.restore("--json").json()
      #expect(restored.verifiedPages == 512)
      #expect(restored.wrongPages == 0)
    }
  }

  @Test("A snapshot replaces an image of the same name, and says so in one JSON object")
  func replaces() throws {
    try withImage { image in
      let saved = try faultline(
        "snapshot", "-o", image.path, "--memory", "16M", "--guest", "process", "--seed", "7",
        "--json")
      #expect(saved.ending == .exit(0), "\(saved)")
      #expect(saved.errors.isEmpty)
      let report: Saved = try saved.json()
      #expect(report.image == image.path)
      #expect(report.memoryBytes == 16 << 20)
      #expect(report.filledPages == 15 * 256)
      #expect(report.guest == "process")
      #expect(try names(in: image.directory) == ["guest.img"])
      let restored: Restored = try image.restore("--json").json()
      #expect(restored.verifiedPages == 15 * 256)
      #expect(restored.wrongPages == 0)
    }
  }

  @Test("Without --guest the best one here is taken, and it says when that is not KVM")
  func automatic() throws {
    try withTemporaryDirectory { directory in
      let outcome = try faultline(
        "snapshot", "-o", "\(directory)/guest.img", "--memory", "8M", "--json")
      let saved: Saved = try outcome.json()
      #expect(saved.guest == Surroundings.guests.last)
      #expect(outcome.errors.isEmpty == Host.hasKVM)
    }
  }

  @Test("Where /dev/kvm does not work, a KVM guest is refused with advice", .needsKVM, .needsMounts)
  func withoutKVM() throws {
    let outcome = try Surroundings.inFilesystem(
      kibibytes: 32 << 10,
      """
      "$faultline" snapshot -o "$dir/guest.img" --memory 2M --guest kvm || exit 98
      mount --bind /dev/null /dev/kvm || exit 97
      "$faultline" snapshot -o "$dir/refused.img" --memory 2M --guest kvm && exit 96
      "$faultline" restore "$dir/guest.img" && exit 95
      "$faultline" snapshot -o "$dir/process.img" --memory 2M || exit 94
      "$faultline" restore "$dir/process.img" || exit 93
      ls -A "$dir"
      """)
    #expect(outcome.ending == .exit(0), "\(outcome)")
    let errors = outcome.errors.split(separator: "\n")
    try #require(errors.count == 3, "\(outcome)")
    #expect(errors[0].contains("doctor") && errors[0].contains("--guest process"))
    #expect(errors[1].contains("holds a KVM guest") && errors[1].contains("doctor"))
    #expect(errors[2].contains("the guest runs as threads of a plain process"))
    #expect(outcome.output.contains("guest verified: 256 pages, 0 wrong\nguest.img\nprocess.img\n"))
  }
}
