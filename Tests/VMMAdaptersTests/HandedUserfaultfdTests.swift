// SPDX-License-Identifier: Apache-2.0

import Glibc
import HandoverProtocol
import LinuxSystem
import SystemPackage
import TestSupport
import Testing
import Userfault

@testable import VMMAdapters

/// Both protocols.
private enum Way: CaseIterable {
  case firecracker, handover

  /// What is said to a VMM that hands over one range; `nil` when it is taken.
  func refusal(
    of range: HostRange, pageSize: PageSize = .size4KiB, _ userfaultfd: borrowing Userfaultfd
  ) throws -> HandoverError? {
    let number = userfaultfd.descriptor.rawValue
    let address = range.start.rawValue
    if self == .firecracker {
      let object = FakeFirecracker.object(
        address: address, size: range.length, offset: 0, pageSize: pageSize.bytes)
      return try VMMAdaptersTests.refusal(of: Array("[\(object)]".utf8), descriptors: [number])
    }
    let text =
      "{\"type\":\"attach\",\"version\":1,\"descriptors\":[\"userfaultfd\"],\"regions\":["
      + "{\"host_address\":\(address),\"length\":\(range.length),\"offset\":0,"
      + "\"page_size\":\(pageSize.bytes)}]}"
    let connection = HandoverConnection(
      try sentAndClosed(frame(text), descriptors: [number]), limits: smallLimits)
    do throws(HandoverError) {
      _ = try connection.receive()
      return nil
    } catch { return error }
  }
}

/// A set of features, and what is said of it.
private struct Made: Sendable, CustomTestStringConvertible {
  let features: UserfaultFeatures
  /// `nil`: it is served.
  let says: String?
  var testDescription: String { features.description }

  init(_ features: UserfaultFeatures, _ says: String?) {
    (self.features, self.says) = (features, says)
  }

  static let all = [
    Made([], nil),
    Made([.removeEvents, .unmapEvents, .remapEvents, .forkEvents, .threadID, .exactAddress], nil),
    Made([.missingShmem, .missingHugetlbfs, .minorShmem, .minorHugetlbfs, .poison, .move], nil),
    Made([.signalInsteadOfEvent], "UFFD_FEATURE_SIGBUS"),
    Made([.signalInsteadOfEvent, .removeEvents], "UFFD_FEATURE_SIGBUS"),
    Made([.writeProtectFaults], "UFFD_FEATURE_PAGEFAULT_FLAG_WP without UFFD_FEATURE_WP_ASYNC"),
    Made([.writeProtectShmemHugetlbfs], "UFFD_FEATURE_WP_HUGETLBFS_SHMEM without"),
    Made([.writeProtectUnpopulated], "UFFD_FEATURE_WP_UNPOPULATED without"),
    Made([.writeProtectAsync], nil),
    Made(
      [
        .writeProtectFaults, .writeProtectUnpopulated, .writeProtectShmemHugetlbfs,
        .writeProtectAsync,
      ], nil),
    Made([.readWriteProtect], "UFFD_FEATURE_RWP without UFFD_FEATURE_RWP_ASYNC"),
    Made([.readWriteProtect, .readWriteProtectAsync], nil),
  ].filter { Host.has($0.features) }
}

@Suite("What a userfaultfd was made for is known before it is served")
struct HandedUserfaultfdTests {
  @Test("Features that nobody could serve are refused by name", arguments: Made.all, Way.allCases)
  private func features(made: Made, way: Way) throws {
    let memory = try Mapping(anonymous: 4 * 4096)
    let userfaultfd = try Userfaultfd(requiring: made.features)
    try userfaultfd.register(memory.range, modes: .missing)
    let error = try way.refusal(of: memory.range, userfaultfd)
    #expect(error?.code == made.says.map { _ in .invalidDescriptor })
    if let says = made.says {
      #expect(error?.description.contains(says) == true, "\(String(describing: error))")
    }
  }

  @Test(
    "A range that is registered for write protection is refused without WP_ASYNC",
    .enabled(if: Host.has(.writeProtectAsync), "needs WP_ASYNC (Linux 6.7)"),
    arguments: Way.allCases)
  private func writeProtection(way: Way) throws {
    let memory = try Mapping(anonymous: 4 * 4096)
    // The kernel asks for no feature.
    let bare = try Userfaultfd()
    try bare.register(memory.range, modes: [.missing, .writeProtect])
    let error = try way.refusal(of: memory.range, bare)
    #expect(error?.code == .invalidRegions)
    #expect(error?.description.contains("registered for write protection") == true)
    try bare.unregister(memory.range)
    let asynchronous = try Userfaultfd(requiring: .writeProtectAsync)
    try asynchronous.register(memory.range, modes: [.missing, .writeProtect])
    #expect(try way.refusal(of: memory.range, asynchronous) == nil)
  }

  @Test("Memory that is not registered, or nowhere, is refused", arguments: Way.allCases)
  private func unregistered(way: Way) throws {
    let memory = try Mapping(anonymous: 64 * 4096)
    let userfaultfd = try Userfaultfd(requiring: .removeEvents)
    func text() throws -> String? {
      let error = try way.refusal(of: memory.range, userfaultfd)
      #expect(error?.code == .invalidRegions)
      return error?.description
    }
    #expect(try text()?.contains("region 0: it is not registered at") == true)
    try userfaultfd.register(memory.range, modes: .missing)
    #expect(try way.refusal(of: memory.range, userfaultfd) == nil)
    for page in [0, 33, 63] {
      let hole = HostRange(start: memory.range.start.advanced(by: page * 4096), length: 4096)
      try userfaultfd.unregister(hole)
      #expect(try text()?.contains("not registered at \(hole.start)") == true)
      try userfaultfd.register(hole, modes: .missing)
    }
    let error = try way.refusal(
      of: HostRange(start: HostAddress(1 << 55), length: 4096), userfaultfd)
    #expect(error?.code == .invalidRegions)
    #expect(error?.description.contains("no address of its process") == true)
  }

  @Test("Pages have the size that is claimed", arguments: Way.allCases)
  private func pageSize(way: Way) throws {
    let userfaultfd = try Userfaultfd(wanting: .missingHugetlbfs)
    let small = try Mapping(anonymous: 4 << 20, alignment: 2 << 20)
    try userfaultfd.register(small.range, modes: .missing)
    let error = try way.refusal(of: small.range, pageSize: .size2MiB, userfaultfd)
    #expect(error?.code == .invalidRegions)
    #expect(error?.description.contains("its page size is 2 MiB, and at") == true)
    #expect(try way.refusal(of: small.range, userfaultfd) == nil)
    #expect(try small.residentPages().allSatisfy { !$0 })
  }

  @Test(
    "Pages of hugetlbfs have the size that is claimed",
    .enabled(if: Host.hasHugePages(8), "needs 8 free pages of 2 MiB"),
    arguments: Way.allCases, [PageSize.size2MiB, .size1GiB])
  private func hugePageSize(way: Way, pageSize: PageSize) throws {
    let userfaultfd = try Userfaultfd(requiring: .missingHugetlbfs)
    let large = try Mapping(
      anonymousHugePages: max(4 << 20, pageSize.bytes), pageSize: pageSize, reserved: false)
    try userfaultfd.register(large.range, modes: .missing)
    for claimed in [PageSize.size4KiB, .size2MiB] {
      let error = try way.refusal(of: large.range, pageSize: claimed, userfaultfd)
      guard claimed != pageSize else {
        #expect(error == nil)
        continue
      }
      #expect(error?.code == .invalidRegions)
      #expect(error?.description.contains("it has larger pages") == true)
    }
  }
}
