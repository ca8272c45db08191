// SPDX-License-Identifier: Apache-2.0

import Foundation
import TestSupport
import Testing

@Suite("restore of an image with a damaged block")
struct DamageTests {
  private func address(_ block: Int) -> String { "0x" + String(block * 4096, radix: 16) }

  @Test(
    "The guest is stopped at the damaged page, which is named; nothing is reported as right",
    arguments: Surroundings.guests,
    [
      ["--strategy", "lazy"], ["--strategy", "eager"], ["--order", "random"],
      ["--backing", "memfd", "--faults", "minor"], ["--workload", "touch"],
    ])
  func damaged(_ guest: String, _ options: [String]) throws {
    try withImage(guest: guest) { image in
      let block = try image.damageBlock(from: 700)
      let outcome = try faultline(["restore", image.path, "--json"] + options)
      #expect(outcome.ending == .exit(2), "\(outcome)")
      let restored: Restored = try outcome.json()
      #expect(restored.failedPages == 1)
      #expect(restored.damagedPages.count == 1)
      for text in [restored.damagedPages.first ?? "", outcome.errors] {
        #expect(text.contains(address(block)))
        #expect(text.contains("block \(block)"))
        #expect(text.contains(image.path))
        #expect(text.contains("checksum"))
      }
      let guestError = try #require(restored.guestError)
      #expect(guestError.contains(address(block)))
      #expect(guestError.contains("poisoned"))
      #expect(restored.verifiedPages == nil)
      #expect(restored.wrongPages == nil)
    }
  }

  @Test("The text for people says it too, and has no verdict", arguments: ["lazy", "eager"])
  func humanOutput(_ strategy: String) throws {
    try withImage { image in
      let block = try image.damageBlock(from: 1500)
      let outcome = try image.restore("--strategy", strategy)
      #expect(outcome.ending == .exit(2), "\(outcome)")
      #expect(outcome.output.contains("damaged pages"))
      #expect(outcome.output.contains(address(block)))
      #expect(outcome.errors.contains("block \(block)"))
      #expect(!outcome.output.contains("guest verified"))
    }
  }

  @Test(
    "In huge pages the whole huge page is withheld",
    .enabled(if: Host.hasHugePages(16), "needs 16 free pages of 2 MiB"))
  func hugePage() throws {
    try withImage { image in
      let block = try image.damageBlock(from: 700)
      let outcome = try image.restore("--json", "--backing", "hugetlb-2M", "--faults", "minor")
      #expect(outcome.ending == .exit(2), "\(outcome)")
      let restored: Restored = try outcome.json()
      #expect(restored.damagedPages.first?.contains("block \(block)") == true)
      #expect(restored.guestError?.contains(address(block / 512 * 512)) == true)
      #expect(restored.verifiedPages == nil)
    }
  }

  @Test("A damaged page index withholds the pages that it covers")
  func index() throws {
    try withImage { image in
      try image.damageIndex(of: 700)
      let outcome = try image.restore("--json")
      #expect(outcome.ending == .exit(2), "\(outcome)")
      let restored: Restored = try outcome.json()
      #expect(restored.failedPages > 0)
      #expect(restored.damagedPages.first?.contains("index") == true)
      #expect(restored.guestError != nil)
      #expect(restored.verifiedPages == nil)
    }
  }

  @Test(
    "With --on-damage wait the guest waits, until the command is ended",
    arguments: Surroundings.guests)
  func waits(_ guest: String) throws {
    try withImage(guest: guest) { image in
      let block = try image.damageBlock(from: 700)
      let command = try Command(
        of: "/usr/bin/env",
        [
          "--default-signal=INT", Command.executable, "restore", image.path, "--on-damage", "wait",
          "--source-timeout", "500ms",
        ])
      #expect(Delay.until { command.errorsSoFar.contains("a touch waits") || !command.isRunning })
      Delay.microseconds(200_000)
      #expect(command.isRunning)
      command.send(SIGINT)
      let outcome = try command.wait()
      #expect(outcome.ending == .signal(SIGINT), "\(outcome)")
      #expect(outcome.errors.contains(address(block)) && outcome.output.isEmpty, "\(outcome)")
    }
  }

  @Test("With --on-damage stop-vmm a touch ends the command", arguments: Surroundings.guests)
  func stops(_ guest: String) throws {
    try withImage(guest: guest) { image in
      let block = try image.damageBlock(from: 700)
      let outcome = try image.restore("--on-damage", "stop-vmm", "--order", "random")
      #expect(outcome.ending == .signal(SIGKILL), "\(outcome)")
      #expect(outcome.errors.contains(address(block)) && outcome.output.isEmpty, "\(outcome)")
      // Nobody touches it.
      let untouched = try image.restore("--on-damage", "stop-vmm", "--workload", "none")
      #expect(untouched.ending == .exit(0), "\(untouched)")
    }
  }

  @Test("A guest that never touches the damaged page is not disturbed by it")
  func untouched() throws {
    try withImage { image in
      _ = try image.damageBlock(from: 700)
      let lazy = try image.restore("--json", "--workload", "none")
      #expect(lazy.ending == .exit(0), "\(lazy)")
      // Eager reads everything, so it finds out.
      let eager = try image.restore("--json", "--workload", "none", "--strategy", "eager")
      #expect(eager.ending == .exit(2), "\(eager)")
      let restored: Restored = try eager.json()
      #expect(restored.failedPages == 1)
      #expect(restored.guestError == nil)
    }
  }
}
