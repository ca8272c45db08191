// SPDX-License-Identifier: Apache-2.0

import LinuxSystem
import SystemPackage
import TestSupport
import Testing
import Userfault

private let huge = PageSize.size2MiB.bytes

/// Watched memory of a pool, and 2 MiB of ones to fill it with.
private struct Watched: ~Copyable {
  let pool: SmallHugePagePool
  let file: MemoryFile
  let memory: Mapping
  let userfaultfd: Userfaultfd
  let ones: Mapping

  init(_ sharing: MappingSharing, pages: Int) throws {
    let pool = try SmallHugePagePool(pages: pages)
    let file = try pool.makeFile(pages: pages)
    let memory = try Mapping(of: file.descriptor, length: file.length, sharing: sharing)
    let userfaultfd = try Userfaultfd(
      requiring: [.missingHugetlbfs], wanting: [.minorHugetlbfs, .poison])
    try userfaultfd.register(
      memory.range, modes: sharing == .shared ? [.missing, .minor] : .missing)
    let ones = try Mapping(anonymous: huge * pages)
    for offset in stride(from: 0, to: ones.length, by: 4096) {
      store(1, ones.range, offset: offset)
    }
    self.pool = pool
    self.file = file
    self.memory = memory
    self.userfaultfd = userfaultfd
    self.ones = ones
  }

  func range(_ page: Int) -> HostRange {
    HostRange(start: memory.range.start.advanced(by: page * huge), length: huge)
  }

  func copy(_ page: Int, pages: Int = 1) -> Resolution {
    // SAFETY: `ones` has as many bytes as all of the memory.
    unsafe userfaultfd.copy(
      from: ones.pointer, to: range(page).start, length: pages * huge)
  }

  func isResident(_ page: Int) throws -> Bool { try memory.residentPages()[page * 512] }
}

@Suite(
  "What the kernel answers where no huge page can be had",
  .enabled(if: SmallHugePagePool.isAvailable, "needs root and 16 free pages of 2 MiB"))
struct EmptyPoolTests {
  @Test(
    "UFFDIO_COPY says that a page is there when it is not",
    arguments: [MappingSharing.private, .shared])
  func copySaysPresent(sharing: MappingSharing) throws {
    let watched = try Watched(sharing, pages: 2)
    try watched.pool.hold()
    #expect(watched.pool.freePages == 0)
    #expect(watched.copy(0) == Resolution(bytesDone: 0, obstacle: .alreadyPresent))
    #expect(try !watched.isResident(0))
    try watched.pool.free(1)
    #expect(watched.copy(0) == Resolution(bytesDone: huge))
    #expect(try watched.isResident(0))
    #expect(watched.copy(0) == Resolution(bytesDone: 0, obstacle: .alreadyPresent))
    #expect(load(watched.memory.range, offset: 0) == 1)
  }

  @Test(
    "UFFDIO_COPY of several keeps the pages that there were",
    arguments: [MappingSharing.private, .shared])
  func copiesPart(sharing: MappingSharing) throws {
    let watched = try Watched(sharing, pages: 2)
    try watched.pool.hold(1)
    #expect(watched.copy(0, pages: 2) == Resolution(bytesDone: huge, obstacle: .partial))
    #expect(try watched.isResident(0))
    #expect(try !watched.isResident(1))
  }

  @Test(
    "A poison marker needs no page, tells an absent page from one that is there, and is replaced by a copy",
    .enabled(if: Host.has(.poison), "needs UFFDIO_POISON (Linux 6.6)"),
    arguments: [MappingSharing.private, .shared])
  func poisonNeedsNoPage(sharing: MappingSharing) throws {
    let watched = try Watched(sharing, pages: 2)
    #expect(watched.copy(1) == Resolution(bytesDone: huge))
    try watched.pool.hold()
    #expect(watched.userfaultfd.poison(watched.range(0)) == Resolution(bytesDone: huge))
    #expect(guardedLoad(watched.memory.range, offset: 0) == .busError)
    for page in 0...1 {
      #expect(
        watched.userfaultfd.poison(watched.range(page))
          == Resolution(bytesDone: 0, obstacle: .alreadyPresent))
    }
    #expect(watched.copy(0) == Resolution(bytesDone: 0, obstacle: .alreadyPresent))
    #expect(guardedLoad(watched.memory.range, offset: 0) == .busError)
    try watched.pool.free(1)
    #expect(watched.copy(0) == Resolution(bytesDone: huge))
    #expect(load(watched.memory.range, offset: 0) == 1)
  }

  @Test("The page cache says that it has no room; continue of a page that is there needs none")
  func pageCache() throws {
    let watched = try Watched(.shared, pages: 2)
    try watched.file.descriptor.allocate(offset: huge, length: huge)
    try watched.pool.hold()
    #expect(throws: Errno.noSpace) {
      try watched.file.descriptor.allocate(offset: 0, length: huge)
    }
    let alias = try Mapping(of: watched.file.descriptor, length: huge, sharing: .shared)
    #expect(throws: Errno.badAddress) {
      try unsafe GuardedCopy.write(
        UnsafeRawBufferPointer(start: watched.ones.pointer, count: 4096), to: alias.range.start)
    }
    #expect(
      watched.userfaultfd.continue(watched.range(0)) == Resolution(bytesDone: 0, obstacle: .absent))
    #expect(watched.userfaultfd.continue(watched.range(1)) == Resolution(bytesDone: huge))
    #expect(load(watched.memory.range, offset: huge) == 0)
  }

  @Test("A touch that nobody watches raises SIGBUS")
  func touchRaisesSignal() throws {
    let pool = try SmallHugePagePool(pages: 1)
    let memory = try pool.makeMapping(pages: 1, sharing: .private)
    try pool.hold()
    #expect(guardedLoad(memory.range, offset: 0) == .busError)
    try pool.free()
    #expect(guardedLoad(memory.range, offset: 0) == .value(0))
  }
}
