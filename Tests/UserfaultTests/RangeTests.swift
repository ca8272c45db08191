// SPDX-License-Identifier: Apache-2.0

import LinuxSystem
import SystemPackage
import TestSupport
import Testing
import Userfault

private let huge = PageSize.size2MiB

@Suite("What somebody registered is told without touching it")
struct RangeTests {
  /// 8 MiB of each kind.
  enum Kind: CaseIterable {
    case anonymous, memfd, privateMemfd, hugetlb, unreserved, privateHugetlb

    var pageSize: PageSize {
      switch self {
      case .anonymous, .memfd, .privateMemfd: .size4KiB
      case .hugetlb, .unreserved, .privateHugetlb: .size2MiB
      }
    }

    static let usual = allCases.filter { Host.hasHugePages(16) || $0.pageSize == .size4KiB }

    func map() throws -> Mapping {
      let length = 8 << 20
      switch self {
      case .anonymous: return try Mapping(anonymous: length, alignment: 2 << 20)
      case .unreserved:
        return try Mapping(anonymousHugePages: length, pageSize: .size2MiB, reserved: false)
      case .privateHugetlb: return try Mapping(anonymousHugePages: length, pageSize: .size2MiB)
      case .memfd, .privateMemfd, .hugetlb:
        let file = try MemoryFile(name: "range", length: length, pageSize: pageSize)
        return try Mapping(
          of: file.descriptor, length: length, sharing: self == .privateMemfd ? .private : .shared)
      }
    }
  }

  @Test(
    "Pages are of the size that they have, and none comes of the question", arguments: Kind.usual)
  func pageSize(kind: Kind) throws {
    let memory = try kind.map()
    let userfaultfd = try Userfaultfd(wanting: [.missingShmem, .missingHugetlbfs])
    try userfaultfd.register(memory.range, modes: .missing)
    // Of huge pages a part that begins and ends with one.
    let start = (memory.range.start.rawValue + (2 << 20) - 1) & ~((2 << 20) - 1)
    let part = HostRange(start: HostAddress(start), length: 4 << 20)
    for _ in 0..<3 {
      let small = try userfaultfd.defect(of: part, pageSize: .size4KiB)
      let large = try userfaultfd.defect(of: part, pageSize: .size2MiB)
      if kind.pageSize == .size4KiB {
        #expect(small == nil && large == .smallerPages(part.start))
      } else {
        #expect(large == nil && small == .largerPages(part.start))
      }
      #expect(try memory.residentPages().allSatisfy { !$0 })
    }
    // Pages that are there make no difference.
    let length = kind.pageSize.bytes
    let filled = unsafe withPage(of: 7, pages: 512) { bytes in
      unsafe userfaultfd.copy(from: bytes, to: part.start, length: length)
    }
    #expect(filled == Resolution(bytesDone: length))
    #expect(try userfaultfd.defect(of: part, pageSize: kind.pageSize) == nil)
    let other = kind.pageSize == .size4KiB ? huge : .size4KiB
    #expect(try userfaultfd.defect(of: part, pageSize: other) != nil)
    #expect(load(part, offset: 0) == 0x0707_0707_0707_0707)
  }

  @Test(
    "No huge page is missing after the question, nor is one needed",
    .enabled(if: SmallHugePagePool.isAvailable, "needs root and 16 free pages of 2 MiB"),
    arguments: [MappingSharing.private, .shared])
  func pool(sharing: MappingSharing) throws {
    let pool = try SmallHugePagePool(pages: 2)
    let memory = try pool.makeMapping(pages: 2, sharing: sharing)
    let userfaultfd = try Userfaultfd(requiring: .missingHugetlbfs)
    try userfaultfd.register(memory.range, modes: .missing)
    #expect(try userfaultfd.defect(of: memory.range, pageSize: huge) == nil)
    #expect(pool.freePages == 2)
    try pool.hold()
    #expect(try userfaultfd.defect(of: memory.range, pageSize: huge) == nil)
    #expect(
      try userfaultfd.defect(of: memory.range, pageSize: .size4KiB)
        == .largerPages(memory.range.start))
  }

  @Test(
    "What is reserved stays so",
    .enabled(if: SmallHugePagePool.isAvailable, "needs root and 16 free pages of 2 MiB"),
    arguments: [MappingSharing.private, .shared])
  func reserved(sharing: MappingSharing) throws {
    let pool = try SmallHugePagePool(pages: 2)
    let file = try pool.makeFile(pages: 2)
    do {
      let memory = try Mapping(
        of: file.descriptor, length: file.length, sharing: sharing, reserved: true)
      let userfaultfd = try Userfaultfd(requiring: .missingHugetlbfs)
      try userfaultfd.register(memory.range, modes: .missing)
      for _ in 0..<5 { #expect(try userfaultfd.defect(of: memory.range, pageSize: huge) == nil) }
      try pool.hold()
      try userfaultfd.unregister(memory.range)
      for page in 0..<2 {
        #expect(guardedLoad(memory.range, offset: page * huge.bytes) == .value(0))
      }
      try pool.free()
    }
    try file.punchHole(offset: 0, length: file.length)
    #expect(pool.freePages == 2)
  }

  @Test("Pages of 1 GiB are neither of 2 MiB nor of 4 KiB, also where there are none")
  func gigantic() throws {
    let memory: Mapping
    do throws(Errno) {
      memory = try Mapping(anonymousHugePages: 1 << 30, pageSize: .size1GiB, reserved: false)
    } catch {
      try #require(error == .noMemory || error == .invalidArgument)
      return
    }
    let userfaultfd = try Userfaultfd(requiring: .missingHugetlbfs)
    try userfaultfd.register(memory.range, modes: .missing)
    for size in [PageSize.size4KiB, .size2MiB] {
      #expect(
        try userfaultfd.defect(of: memory.range, pageSize: size)
          == .largerPages(memory.range.start))
    }
    #expect(try userfaultfd.defect(of: memory.range, pageSize: .size1GiB) == nil)
  }

  @Test("A part that is not registered is found, wherever it is")
  func holes() throws {
    let memory = try Mapping(anonymous: 1000 * 4096)
    func range(_ first: Int, _ count: Int) -> HostRange {
      HostRange(start: memory.range.start.advanced(by: first * 4096), length: count * 4096)
    }
    for hole in [0, 1, 499, 998, 999] {
      let userfaultfd = try Userfaultfd()
      try userfaultfd.register(memory.range, modes: .missing)
      #expect(try userfaultfd.defect(of: memory.range, pageSize: .size4KiB) == nil)
      try userfaultfd.unregister(range(hole, 1))
      #expect(
        try userfaultfd.defect(of: memory.range, pageSize: .size4KiB)
          == .notRegistered(range(hole, 1).start))
      if hole > 0 {
        #expect(try userfaultfd.defect(of: range(0, hole), pageSize: .size4KiB) == nil)
      }
    }
    let other = try Userfaultfd()
    #expect(
      try other.defect(of: memory.range, pageSize: .size4KiB)
        == .notRegistered(memory.range.start))
    let high = HostRange(start: HostAddress(1 << 55), length: 4096)
    #expect(try other.defect(of: high, pageSize: .size4KiB) == .outside(high.start))
  }

  @Test(
    "Many mappings in one range are right, and those that are registered for write protection are found",
    .enabled(if: Host.has(.writeProtectAsync), "needs WP_ASYNC (Linux 6.7)"),
    arguments: [8, 3000])
  func manyMappings(pages: Int) throws {
    let memory = try Mapping(anonymous: pages * 4096)
    for features in [UserfaultFeatures.writeProtectAsync, []] {
      let userfaultfd = try Userfaultfd(requiring: features)
      try userfaultfd.register(memory.range, modes: .missing)
      // Each is a mapping of its own then.
      for page in stride(from: 1, to: pages, by: 2) {
        try userfaultfd.register(
          HostRange(start: memory.range.start.advanced(by: page * 4096), length: 4096),
          modes: [.missing, .writeProtect])
      }
      let defect = try userfaultfd.defect(of: memory.range, pageSize: .size4KiB)
      let second = memory.range.start.advanced(by: 4096)
      #expect(defect == (features.isEmpty ? .writeProtected(second) : nil))
      // Also when there are too many to ask for each.
      try userfaultfd.unregister(
        HostRange(start: memory.range.end.advanced(by: -4096), length: 4096))
      if !features.isEmpty {
        #expect(
          try userfaultfd.defect(of: memory.range, pageSize: .size4KiB)
            == .notRegistered(memory.range.end.advanced(by: -4096)))
      }
    }
  }

  @Test("While a mapping changes nothing is said of it")
  func changing() throws {
    let giver = try Giver(try Mapping(anonymous: 8 * 4096))
    let userfaultfd = try Userfaultfd(requiring: .removeEvents)
    try userfaultfd.register(giver.memory.range, modes: .missing)
    let thread = try ThreadHandle.start {
      try? giver.memory.advise(.dontNeed, offset: 4096, length: 4096)
    }
    let range = giver.memory.range
    #expect(
      Delay.until {
        (userfaultfd.zeropage(HostRange(start: range.start, length: 4096))).obstacle
          == .mappingChanging
      })
    #expect(try userfaultfd.defect(of: range, pageSize: .size4KiB) == nil)
    var events = EventBuffer()
    #expect(try events.read(from: userfaultfd) == 1)
    _ = events.pop()
    thread.join()
    #expect(try userfaultfd.defect(of: range, pageSize: .size4KiB) == nil)
  }
}
