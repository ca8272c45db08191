// SPDX-License-Identifier: Apache-2.0

import Glibc
import LinuxSystem
import SystemPackage
import TestSupport
import Testing
import Userfault

@Suite("Creation, negotiation and the probe")
struct CreationTests {
  @Test(
    "Every way of creation works", .enabled(if: Host.hasPrivileges, "needs root"),
    arguments: Userfaultfd.Origin.allCases)
  func origins(origin: Userfaultfd.Origin) throws {
    let userfaultfd = try Userfaultfd(requiring: .missingShmem, origin: origin)
    #expect(userfaultfd.features == .missingShmem)
  }

  @Test("User mode only needs no privilege and negotiates as well")
  func userModeOnly() throws {
    _ = try Userfaultfd(origin: .systemCall, userModeOnly: true)
  }

  @Test("A feature that the kernel lacks is refused by its name")
  func missingFeature() throws {
    let invented = UserfaultFeatures(rawValue: 1 << 60)
    let refused = #expect(throws: UserfaultError.self) {
      _ = try Userfaultfd(requiring: [.missingShmem, invented])
    }
    #expect(refused?.code == .missingFeatures)
    #expect(refused?.missing == invented)
    #expect(refused?.description.contains("bit 60") == true)
  }

  @Test("A wish that the kernel lacks is left out")
  func wish() throws {
    let invented = UserfaultFeatures(rawValue: 1 << 60)
    #expect(try Userfaultfd(wanting: [.missingShmem, invented]).features == .missingShmem)
  }

  @Test("Features print the kernel's names")
  func names() {
    let features: UserfaultFeatures = [.removeEvents, .poison, .readWriteProtectAsync]
    #expect(features.description == "EVENT_REMOVE POISON RWP_ASYNC")
  }

  @Test(
    "Without a right to it, the refusal says what to do",
    .enabled(if: Host.hasPrivileges, "needs root to drop it"))
  func unprivileged() async {
    await #expect(processExitsWith: .success) {
      precondition(setuid(65534) == 0)
      do throws(UserfaultError) {
        _ = try Userfaultfd(origin: .automatic)
        // vm.unprivileged_userfaultfd=1 or an open device: nothing to refuse.
      } catch {
        precondition(error.code == .notPermitted)
        precondition(error.description.contains("CAP_SYS_PTRACE"))
      }
    }
  }

  // MARK: - Probe

  func modes(_ outcomes: [RegistrationOutcome], _ modes: RegistrationModes)
    -> Result<RangeOperations, Errno>?
  {
    outcomes.first { $0.modes == modes }?.result
  }

  @Test("Anonymous memory registers MISSING, and refuses MINOR with EINVAL")
  func probeAnonymous() throws {
    let outcomes = try UserfaultProbe.outcomes(for: .anonymous).get()
    #expect(try modes(outcomes, .missing)?.get().isSuperset(of: [.copy, .zeropage]) == true)
    #expect(modes(outcomes, .minor) == .failure(.invalidArgument))
    #expect(modes(outcomes, [.missing, .minor]) == .failure(.invalidArgument))
  }

  @Test("A memfd registers MISSING and MINOR together")
  func probeMemfd() throws {
    let outcomes = try UserfaultProbe.outcomes(for: .memfd).get()
    #expect(
      try modes(outcomes, [.missing, .minor])?.get().isSuperset(of: [.copy, .continue]) == true)
  }

  @Test("hugetlbfs has no ZEROPAGE", .enabled(if: Host.hasHugePages(2), "needs free 2 MiB pages"))
  func probeHugetlb() throws {
    let outcomes = try UserfaultProbe.outcomes(for: .hugetlb(.size2MiB)).get()
    let both = try #require(try modes(outcomes, [.missing, .minor])?.get())
    #expect(both.isSuperset(of: [.copy, .continue]))
    #expect(!both.contains(.zeropage))
  }

  @Test("Memory that the machine cannot give is an error, not a crash")
  func probeImpossible() throws {
    // No machine here has a pool of 1 GiB pages unless somebody made one.
    guard case .failure(let errno) = try UserfaultProbe.outcomes(for: .hugetlb(.size1GiB)) else {
      return
    }
    #expect([Errno.noMemory, .invalidArgument, .noSuchFileOrDirectory].contains(errno))
  }
}
