// SPDX-License-Identifier: Apache-2.0

import KVM
import LinuxSystem
import SystemPackage
import TestGuest
import Userfault

/// Faults on user mappings: minor and missing.
enum UserMappingScenarios {
  static var all: [Scenario] { minor + missing + mappings }

  private static var minor: [Scenario] {
    [
      Scenario("minor: a present page raises a minor fault; CONTINUE maps it") {
        let memory = try SharedGuestMemory()
        try expect(try memory.write([7], at: 3), 4096, "pwrite")
        let userfaultfd = try memory.watch(.minor)
        var reader = FaultReader()
        let toucher = try Toucher(memory.address(3))
        try reader.expect(userfaultfd, at: memory.address(3), isMinor: true)
        try require(copyPage(userfaultfd, memory, 3) == .alreadyPresent, "COPY over it")
        try require(userfaultfd.zeropage(memory.range(3)).obstacle == .alreadyPresent, "ZEROPAGE")
        try require(userfaultfd.continue(memory.range(3)).obstacle == nil, "CONTINUE")
        try expect(toucher.outcome(), .value(7), "the access")
        try require(userfaultfd.continue(memory.range(3)).obstacle == .alreadyPresent, "again")
      },
      Scenario("minor alone: an absent page is zero, without a fault") {
        let memory = try SharedGuestMemory()
        let userfaultfd = try memory.watch(.minor)
        var reader = FaultReader()
        try expect(try Toucher(memory.address(0)).outcome(), .value(0), "the access")
        try reader.expectNone(userfaultfd)
      },
      Scenario("minor: CONTINUE of an absent page is EFAULT") {
        let memory = try SharedGuestMemory()
        let userfaultfd = try memory.watch(.minor)
        try require(userfaultfd.continue(memory.range(5)).obstacle == .absent, "CONTINUE")
      },
      Scenario("minor: CONTINUE of a fallocated page shows zeros, never stale data") {
        try dirtyFreeMemory()
        let memory = try SharedGuestMemory(pageCount: 2048)
        try memory.file.allocate(offset: 0, length: 2048 * 4096, keepsSize: true)
        let userfaultfd = try memory.watch(.minor)
        let resolution = userfaultfd.continue(memory.mapping.range)
        try expect(resolution.bytesDone, 2048 * 4096, "bytes mapped")
        for page in 0..<2048 {
          for word in stride(from: 0, to: 4096, by: 512) {
            let found = GuardedMemory.touch(memory.address(page).advanced(by: word))
            try expect(found, 0, "page \(page), byte \(word)")
          }
        }
      },
    ]
  }

  private static var missing: [Scenario] {
    [
      Scenario("missing: an absent page raises a missing fault; COPY fills and maps it") {
        let memory = try SharedGuestMemory()
        let userfaultfd = try memory.watch(.missing)
        var reader = FaultReader()
        let toucher = try Toucher(memory.address(9), writing: true)
        try reader.expect(userfaultfd, at: memory.address(9), isMinor: false)
        try require(copyPage(userfaultfd, memory, 9) == nil, "COPY")
        try expect(toucher.outcome(), .value(42), "the access")
        try require(copyPage(userfaultfd, memory, 9) == .alreadyPresent, "COPY again")
      },
      Scenario("missing: ZEROPAGE resolves as well") {
        let memory = try SharedGuestMemory()
        let userfaultfd = try memory.watch(.missing)
        var reader = FaultReader()
        let toucher = try Toucher(memory.address(1))
        try reader.expect(userfaultfd, at: memory.address(1), isMinor: false)
        try require(userfaultfd.zeropage(memory.range(1)).obstacle == nil, "ZEROPAGE")
        try expect(toucher.outcome(), .value(0), "the access")
      },
      Scenario("missing alone: a present page is mapped without a fault") {
        let memory = try SharedGuestMemory()
        try expect(try memory.write([11], at: 2), 4096, "pwrite")
        let userfaultfd = try memory.watch(.missing)
        var reader = FaultReader()
        try expect(try Toucher(memory.address(2)).outcome(), .value(11), "the access")
        try reader.expectNone(userfaultfd)
      },
      Scenario("missing + minor: write() and a wake give a minor fault, then CONTINUE") {
        let memory = try SharedGuestMemory()
        let userfaultfd = try memory.watch([.missing, .minor])
        var reader = FaultReader()
        let toucher = try Toucher(memory.address(4))
        try reader.expect(userfaultfd, at: memory.address(4), isMinor: false)
        try expect(try memory.write([13], at: 4), 4096, "pwrite")
        try userfaultfd.wake(memory.range(4))
        try reader.expect(userfaultfd, at: memory.address(4), isMinor: true)
        try require(userfaultfd.continue(memory.range(4)).obstacle == nil, "CONTINUE")
        try expect(toucher.outcome(), .value(13), "the access")
      },
      Scenario("missing + minor: write(), then CONTINUE at once") {
        let memory = try SharedGuestMemory()
        let userfaultfd = try memory.watch([.missing, .minor])
        var reader = FaultReader()
        let toucher = try Toucher(memory.address(4))
        try reader.expect(userfaultfd, at: memory.address(4), isMinor: false)
        try expect(try memory.write([17], at: 4), 4096, "pwrite")
        try require(userfaultfd.continue(memory.range(4)).obstacle == nil, "CONTINUE")
        try expect(toucher.outcome(), .value(17), "the access")
        try reader.expectNone(userfaultfd)
      },
      Scenario("a hole that is punched makes the page missing again") {
        let memory = try SharedGuestMemory()
        let userfaultfd = try memory.watch([.missing, .minor])
        var reader = FaultReader()
        try require(copyPage(userfaultfd, memory, 6) == nil, "COPY")
        try expect(try Toucher(memory.address(6)).outcome(), .value(42), "before")
        try memory.mapping.advise(.remove, offset: 6 * 4096, length: 4096)
        let toucher = try Toucher(memory.address(6))
        try reader.expect(userfaultfd, at: memory.address(6), isMinor: false)
        try require(userfaultfd.zeropage(memory.range(6)).obstacle == nil, "ZEROPAGE")
        try expect(toucher.outcome(), .value(0), "after")
      },
      Scenario("beyond the end: SIGBUS, and no fault is raised") {
        let memory = try SharedGuestMemory(mappedPages: SharedGuestMemory.pageCount + 4)
        let userfaultfd = try memory.watch([.missing, .minor])
        var reader = FaultReader()
        let beyond = SharedGuestMemory.pageCount
        try expect(try Toucher(memory.address(beyond)).outcome(), .busError, "the access")
        try reader.expectNone(userfaultfd)
        try require(copyPage(userfaultfd, memory, beyond) != nil, "COPY beyond the end")
      },
      Scenario("many threads on many pages, served by COPY: every word is right") {
        let memory = try SharedGuestMemory(pageCount: 256)
        let userfaultfd = try memory.watch([.missing, .minor])
        let touchers = try (0..<512).map { try Toucher(memory.address($0 / 2)) }
        var reader = FaultReader()
        var served = Set<UInt64>()
        while served.count < 256 {
          guard let fault = try reader.next(userfaultfd) else {
            throw Mismatch(description: "only \(served.count) pages were asked for")
          }
          let page = memory.address(0).distance(to: fault.address) / 4096
          served.insert(fault.address.rawValue)
          let obstacle = copyPage(userfaultfd, memory, page, word: UInt64(page) + 1000)
          try require(obstacle == nil || obstacle == .alreadyPresent, "COPY of page \(page)")
        }
        for (index, toucher) in touchers.enumerated() {
          try expect(toucher.outcome(), .value(UInt64(index / 2) + 1000), "access \(index)")
        }
      },
    ]
  }

  private static var mappings: [Scenario] {
    [
      Scenario("a descriptor twice, two mappings, one armed: only that one raises faults") {
        let memory = try SharedGuestMemory()
        let twin = try memory.file.duplicate()
        let other = try Mapping(of: twin, length: memory.mapping.length, sharing: .shared)
        let userfaultfd = try memory.watch([.missing, .minor])
        var reader = FaultReader()
        // Through the mapping that is not armed: allocated, no fault.
        try expect(try Toucher(other.range.start, writing: true).outcome(), .value(0), "unarmed")
        try reader.expectNone(userfaultfd)
        unsafe other.pointer.storeBytes(of: 23, as: UInt64.self)
        let toucher = try Toucher(memory.address(0))
        try reader.expect(userfaultfd, at: memory.address(0), isMinor: true)
        try require(userfaultfd.continue(memory.range(0)).obstacle == nil, "CONTINUE")
        try expect(toucher.outcome(), .value(23), "armed")
      },
      Scenario("after unregistering, an absent page is zero") {
        let memory = try SharedGuestMemory()
        let userfaultfd = try memory.watch([.missing, .minor])
        var reader = FaultReader()
        let toucher = try Toucher(memory.address(8))
        try reader.expect(userfaultfd, at: memory.address(8), isMinor: false)
        try userfaultfd.unregister(memory.mapping.range)
        try userfaultfd.wake(memory.mapping.range)
        try expect(toucher.outcome(), .value(0), "the access")
      },
      Scenario("a poisoned page raises SIGBUS") {
        let memory = try SharedGuestMemory()
        let userfaultfd = try memory.watch([.missing, .minor])
        try require(userfaultfd.poison(memory.range(2)).obstacle == nil, "POISON")
        try expect(try Toucher(memory.address(2)).outcome(), .busError, "the access")
      },
    ]
  }

  /// UFFDIO_COPY of a page of one word; what stood in the way.
  private static func copyPage(
    _ userfaultfd: borrowing Userfaultfd, _ memory: SharedGuestMemory, _ page: Int,
    word: UInt64 = 42
  ) -> Resolution.Obstacle? {
    let bytes = Pages.of([word])
    return unsafe bytes.withUnsafeBytes { bytes in
      guard let start = bytes.baseAddress else { return .absent }
      return unsafe userfaultfd.copy(from: start, to: memory.address(page), length: 4096).obstacle
    }
  }

  /// Fills most of the free memory with a pattern and gives it back, so that pages which
  /// are allocated without being cleared show it.
  private static func dirtyFreeMemory() throws {
    let length = 384 << 20
    let mapping = try Mapping(anonymous: length)
    unsafe mapping.pointer.initializeMemory(as: UInt8.self, repeating: 0xA5, count: length)
  }
}
