// SPDX-License-Identifier: Apache-2.0

import TestSupport
import Testing

@Suite("faultline doctor")
struct DoctorTests {
  @Test("Where userfaultfd works it exits with 0, and its last line says so")
  func works() throws {
    let outcome = try faultline("doctor")
    #expect(outcome.ending == .exit(0), "\(outcome)")
    #expect(outcome.errors.isEmpty)
    #expect(outcome.lines.first?.hasPrefix("kernel") == true)
    #expect(outcome.lines.last == "Guests can be restored lazily here.")
  }

  @Test("Its JSON is one object with every kind of memory, tried in several modes")
  func json() throws {
    let outcome = try faultline("doctor", "--json")
    #expect(outcome.ending == .exit(0))
    #expect(outcome.errors.isEmpty)
    let diagnosis: Diagnosis = try outcome.json()
    #expect(diagnosis.canRestoreLazily)
    #expect(!diagnosis.kernel.isEmpty)
    #expect(diagnosis.kvm.available == Host.hasKVM)
    let kinds = Set(diagnosis.memory.map(\.kind))
    #expect(kinds.isSuperset(of: ["anonymous", "memfd", "hugetlb-2M", "guest_memfd"]))
    for memory in diagnosis.memory {
      // Either there is none, and why, or each mode has its answer.
      #expect((memory.unavailable == nil) == !memory.modes.isEmpty, "\(memory)")
      for mode in memory.modes {
        #expect((mode.operations == nil) == (mode.error != nil), "\(memory.kind): \(mode)")
      }
    }
    let anonymous = diagnosis.memory.first { $0.kind == "anonymous" }
    let missing = anonymous?.modes.first { $0.modes == ["MISSING"] }
    #expect(missing?.operations?.contains("COPY") == true)
    // What is named is what a restore takes; where there is none, why.
    #expect(!diagnosis.guestMemfd.reason.isEmpty)
    let offered = diagnosis.memory.first { $0.kind == "guest_memfd" }
    #expect((diagnosis.guestMemfd.strategy == nil) == (offered?.unavailable != nil))
    for advice in diagnosis.advice {
      #expect(!advice.missing.isEmpty && !advice.why.isEmpty && !advice.how.isEmpty)
    }
  }

  @Test(
    "Without the right to a userfaultfd it exits with 1, still reports, and has advice",
    .needsNobody,
    .enabled(
      if: !Surroundings.nobodyHasUserfaultfd, "every user has userfaultfd on this machine"))
  func advises() throws {
    let outcome = try Surroundings.asNobody(["doctor"])
    #expect(outcome.ending == .exit(1), "\(outcome)")
    #expect(outcome.errors.isEmpty)
    #expect(outcome.output.contains("kernel"))
    #expect(outcome.output.contains("uid \(Surroundings.nobody)"))
    #expect(outcome.output.contains("missing, and how to get it"))
    #expect(outcome.output.contains("vm.unprivileged_userfaultfd=1"))
    #expect(outcome.lines.last == "Guests cannot be restored lazily here.")
  }

  @Test(
    "The same as JSON", .needsNobody,
    .enabled(
      if: !Surroundings.nobodyHasUserfaultfd, "every user has userfaultfd on this machine"))
  func advisesInJSON() throws {
    let outcome = try Surroundings.asNobody(["doctor", "--json"])
    #expect(outcome.ending == .exit(1))
    let diagnosis: Diagnosis = try outcome.json()
    #expect(!diagnosis.canRestoreLazily)
    #expect(diagnosis.userID == Surroundings.nobody)
    #expect(diagnosis.systemCall != nil)
    #expect(diagnosis.device != nil)
    let advice = try #require(diagnosis.advice.first { $0.missing == "userfaultfd" })
    #expect(advice.how.contains("vm.unprivileged_userfaultfd=1"))
    #expect(advice.how.contains("/dev/userfaultfd"))
  }
}
