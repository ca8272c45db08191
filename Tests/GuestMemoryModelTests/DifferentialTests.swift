// SPDX-License-Identifier: Apache-2.0

import Foundation
import GuestMemoryModel
import LinuxSystem
import ModelCheck
import TestSupport
import Testing
import Userfault

/// The model against the kernel that runs this test.
@Suite(.serialized, .enabled(if: Host.hasPrivileges, "faults of system calls need root"))
struct DifferentialTests {
  /// Steps for each kind of memory; FAULTLINE_DIFFERENTIAL_OPERATIONS changes it.
  private static let operations =
    ProcessInfo.processInfo.environment["FAULTLINE_DIFFERENTIAL_OPERATIONS"].flatMap { Int($0) }
    ?? 20_000

  /// The first seed; FAULTLINE_DIFFERENTIAL_SEED changes it.
  private static let seed =
    ProcessInfo.processInfo.environment["FAULTLINE_DIFFERENTIAL_SEED"].flatMap { UInt64($0) } ?? 1

  /// 7.3 refuses a registration that drops WP; its feature bits say which kernel this is.
  private static let kernel: KernelVariant =
    Host.has(.readWriteProtect) ? .linux7_3 : .linux6_18

  private func compare(_ setup: Setup, pageSize: PageSize = .size4KiB) throws {
    let source = try SourcePages(pages: setup.mappingPages, pageBytes: pageSize.bytes)
    let clock = ContinuousClock()
    let start = clock.now
    let report = try Differential(setup) { try KernelSubject($0, source: source) }
      .run(operations: Self.operations, seed: Self.seed)
    let seconds = (clock.now - start) / .seconds(1)
    print(
      "\(setup.memory.name)\(setup.protectsUnpopulated ? " with WP_UNPOPULATED" : ""): "
        + "\(report.operations) operations, \(report.waits) waits, seeds from \(Self.seed), "
        + "\(Int(Double(report.operations) / seconds)) operations/s")
    if let disagreement = report.disagreement { Issue.record("\(disagreement)") }
    #expect(report.disagreement == nil)
  }

  @Test(arguments: [false, true])
  func anonymousMemoryBehavesAsTheModelSays(protectsUnpopulated: Bool) throws {
    try compare(
      Setup(.anonymous, kernel: Self.kernel, protectsUnpopulated: protectsUnpopulated))
  }

  @Test func sharedTmpfsBehavesAsTheModelSays() throws {
    try compare(Setup(.tmpfsShared, kernel: Self.kernel))
  }

  @Test func privateTmpfsBehavesAsTheModelSays() throws {
    try compare(Setup(.tmpfsPrivate, kernel: Self.kernel))
  }

  @Test(.enabled(if: Host.hasHugePages(12), "needs 12 free 2 MiB pages"))
  func hugetlbBehavesAsTheModelSays() throws {
    try compare(
      Setup(.hugetlb, kernel: Self.kernel, objectPages: 4), pageSize: .size2MiB)
  }
}
