// SPDX-License-Identifier: Apache-2.0

import Foundation
import HostileGuests
import TestSupport
import Testing

private let hasHugePages = Host.hasHugePages(32)
private let hasRoot = Host.hasPrivileges && ControlGroups.areAvailable

@Suite("A hostile guest harms neither another one nor the service", .serialized)
struct HostileGuestTests {
  /// One alone: FAULTLINE_HOSTILE=swarm ./test --filter HostileGuestTests
  private static func scenarios(_ isWanted: (HostileScenario) -> Bool) -> [HostileScenario] {
    let name = ProcessInfo.processInfo.environment["FAULTLINE_HOSTILE"]
    return HostileScenario.all.filter { isWanted($0) && (name == nil || $0.name == name) }
  }

  private func expectNone(_ violations: [String]) {
    #expect(violations.isEmpty, "\(violations.joined(separator: "\n"))")
  }

  private func play(_ scenario: HostileScenario) throws {
    let round = HostileRound(scenario, seconds: 1, command: builtProduct("faultline"))
    expectNone(try round.served().violations)
  }

  private func soak(_ memory: HostileSoak.Memory) throws {
    let operations = testSetting("FAULTLINE_HOSTILE_OPERATIONS", usual: 20_000)
    let soak = HostileSoak(
      memory, operations: operations / HostileSoak.Memory.allCases.count,
      command: builtProduct("faultline"))
    expectNone(try soak.run().violations)
  }

  @Test(
    "An honest guest beside it has its pages, and the service lives within its bounds",
    arguments: scenarios { $0.needs.isEmpty })
  func rounds(_ scenario: HostileScenario) throws { try play(scenario) }

  @Test(
    "The same with huge pages", .enabled(if: hasHugePages, "needs 32 free pages of 2 MiB"),
    arguments: scenarios { $0.needs == [.hugePages] })
  func hugePages(_ scenario: HostileScenario) throws { try play(scenario) }

  @Test(
    "The same with a service, or a guest, that has too little of something",
    .enabled(if: hasRoot && hasHugePages, "needs root, cgroups v1, and 32 free pages of 2 MiB"),
    arguments: scenarios { $0.needs.contains(.root) })
  func shortages(_ scenario: HostileScenario) throws { try play(scenario) }

  @Test(
    "Random operations with a hostile guest beside it: every block has what it has to have",
    arguments: [HostileSoak.Memory.smallPages, .sharedSmallPages])
  func soakInSmallPages(_ memory: HostileSoak.Memory) throws { try soak(memory) }

  @Test(
    "The same in huge pages, which are given back in parts, and of which there are not always any",
    .enabled(if: hasRoot && hasHugePages, "needs root, and 32 free pages of 2 MiB"),
    arguments: [HostileSoak.Memory.unreservedHugePages, .sharedHugePages, .reusedAddresses])
  func soakInHugePages(_ memory: HostileSoak.Memory) throws { try soak(memory) }
}
