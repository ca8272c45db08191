// SPDX-License-Identifier: Apache-2.0

import CTestSupport
import Glibc
import GuestMemory
import LinuxSystem
import Synchronization
import TestSupport
import Testing
import Userfault

@testable import Pager

@Suite("Memory that is moved or forked while it is served")
struct MovedMemoryTests {
  private static let pages = 256

  /// Memory that is never unmapped: where it was moved from, somebody else's may be.
  private final class Served: Sendable {
    let range: HostRange
    let source = PatternSource()
    let session: PagerSession<PatternSource>

    init(pages: Int = MovedMemoryTests.pages, features: UserfaultFeatures = []) throws {
      let mapping = try Mapping(anonymous: pages * 4096)
      let range = mapping.range
      session = try PagerSession(
        userfaultfd: try Userfaultfd(
          wanting: PagerSession<PatternSource>.features.wanted.union(features)),
        regions: [try PagedRegion(host: range, pageSize: .size4KiB, guestAddress: GuestAddress(0))],
        source: source)
      self.range = range
      let kept = MappedMemorySource.SharedMapping(mapping)
      Self.kept.withLock { $0.append(kept) }
      try session.start()
    }

    private static let kept = Mutex<[MappedMemorySource.SharedMapping]>([])
    deinit { session.release() }

    /// Moves some pages to another place.
    func move(_ pages: Range<Int>) throws -> HostRange {
      let start = UInt(range.start.rawValue) + UInt(pages.lowerBound * 4096)
      let length = UInt(pages.count * 4096)
      let place = ctest_move_mapping(start, length)
      try #require(place != 0)
      return HostRange(start: HostAddress(UInt64(place)), length: Int(length))
    }
  }

  @Test(
    "What was moved is served where it is now", arguments: [0..<256, 0..<100, 57..<113, 200..<256])
  func moved(pages: Range<Int>) throws {
    let served = try Served()
    for block in stride(from: 0, to: Self.pages, by: 5) {
      _ = load(served.range, offset: block * 4096)
    }
    let place = try served.move(pages)
    defer { ctest_unmap(UInt(place.start.rawValue), UInt(place.length)) }
    for block in 0..<Self.pages {
      let value =
        pages.contains(block)
        ? load(place, offset: (block - pages.lowerBound) * 4096)
        : load(served.range, offset: block * 4096)
      #expect(value == served.source.expected(block: block), "block \(block)")
    }
    #expect(Delay.until { served.session.statistics.remapEvents == 1 })
    #expect(served.session.failures.isEmpty)
  }

  @Test("What was given back stays zero wherever it is moved")
  func removedAndMoved() throws {
    let served = try Served()
    let first = try served.move(0..<128)
    try withExtendedLifetime(served) {
      let start = UInt(first.start.rawValue)
      #expect(
        unsafe madvise(UnsafeMutableRawPointer(bitPattern: start), 64 * 4096, MADV_DONTNEED) == 0)
      // Once more, with a part of it.
      let second = ctest_move_mapping(start + 32 * 4096, 64 * 4096)
      try #require(second != 0)
      defer {
        ctest_unmap(start, 128 * 4096)
        ctest_unmap(second, 64 * 4096)
      }
      let moved = HostRange(start: HostAddress(UInt64(second)), length: 64 * 4096)
      for block in 0..<32 { #expect(load(first, offset: block * 4096) == 0) }
      for block in 32..<64 { #expect(load(moved, offset: (block - 32) * 4096) == 0) }
      for block in 64..<96 {
        #expect(load(moved, offset: (block - 32) * 4096) == served.source.expected(block: block))
      }
      for block in 96..<128 {
        #expect(load(first, offset: block * 4096) == served.source.expected(block: block))
      }
    }
    #expect(served.session.failures.isEmpty)
  }

  @Test("Pages are filled while others move")
  func moving() throws {
    let served = try Served(pages: 2048)
    let toucher = try ThreadHandle.start {
      for block in 1024..<2048 {
        #expect(load(served.range, offset: block * 4096) == served.source.expected(block: block))
      }
    }
    let filler = try ThreadHandle.start { try? served.session.populate() }
    var places: [(first: Int, range: HostRange)] = []
    for first in stride(from: 0, to: 1024, by: 64) {
      places.append((first, try served.move(first..<first + 64)))
    }
    for (first, range) in places {
      for block in 0..<64 {
        #expect(load(range, offset: block * 4096) == served.source.expected(block: first + block))
      }
      ctest_unmap(UInt(range.start.rawValue), UInt(range.length))
    }
    toucher.join()
    filler.join()
    #expect(served.session.failures.isEmpty)
  }

  @Test(
    "A forked child reads what was there, and what was not is a memory error",
    .enabled(if: Host.hasPrivileges, "FORK events need CAP_SYS_PTRACE"))
  func forked() throws {
    let served = try Served(features: .forkEvents)
    try #require(served.session.canPoison, "this kernel has no UFFDIO_POISON")
    #expect(load(served.range, offset: 4096) == served.source.expected(block: 1))
    var value: UInt64 = 0
    let start = UInt(served.range.start.rawValue)
    #expect(unsafe ctest_fork_and_load(start + 4096, &value) == 0)
    #expect(value == served.source.expected(block: 1))
    #expect(unsafe ctest_fork_and_load(start + 2 * 4096, &value) > 0)
    // The parent is not affected.
    for block in 0..<Self.pages {
      #expect(load(served.range, offset: block * 4096) == served.source.expected(block: block))
    }
    #expect(served.session.failures.isEmpty)
    #expect(Delay.until { served.session.statistics.forkEvents == 2 })
  }

  @Test(
    "Children that are gone leave no thread and no descriptor behind",
    .enabled(if: Host.hasPrivileges, "FORK events need CAP_SYS_PTRACE"))
  func forkedAndGone() async {
    await #expect(processExitsWith: .success) {
      let served = try Served(features: .forkEvents)
      let descriptors = openDescriptorCount()
      for _ in 0..<20 { precondition(ctest_fork_and_wait() > 0) }
      precondition(Delay.until { openDescriptorCount() <= descriptors }, "descriptors stay")
      precondition(ctest_fork_and_wait() > 0)
      served.session.stop()
      precondition(Delay.until { Host.threads(named: "forkedchildren") == 0 }, "a thread stays")
      precondition(Delay.until { openDescriptorCount() < descriptors }, "descriptors stay")
    }
  }
}
