// SPDX-License-Identifier: Apache-2.0

import KVM
import LinuxSystem
import SystemPackage
import Userfault

/// Population by pwrite(2).
enum WriteScenarios {
  static var all: [Scenario] {
    [
      Scenario("write: absent pages get their content") {
        let memory = try SharedGuestMemory()
        try expect(try memory.write([1, 2, 3], at: 10), 3 * 4096, "pwrite")
        for page in 0..<3 {
          let found = try Toucher(memory.address(10 + page)).outcome()
          try expect(found, .value(UInt64(page) + 1), "page \(page)")
        }
      },
      Scenario("write: EEXIST when the first page is there, a short count at a later one") {
        let memory = try SharedGuestMemory()
        try expect(try memory.write([5], at: 2), 4096, "the first pwrite")
        try expectErrno(.fileExists) { try memory.write([6, 6], at: 2) }
        try expect(try memory.write([7, 7, 7, 7], at: 0), 2 * 4096, "a pwrite across")
        try expect(try Toucher(memory.address(2)).outcome(), .value(5), "what was there")
        try expect(try Toucher(memory.address(1)).outcome(), .value(7), "what was written")
      },
      Scenario("write: a fallocated page is there") {
        let memory = try SharedGuestMemory()
        try memory.file.allocate(offset: 0, length: 4096, keepsSize: true)
        try expectErrno(.fileExists) { try memory.write([6], at: 0) }
      },
      Scenario("write: what is not whole pages within the file is EINVAL") {
        let memory = try SharedGuestMemory()
        let bytes = Pages.of([1, 1])
        for (offset, length) in [(1, 4096), (0, 4095), (0, 512), (512, 4096)] {
          try expectErrno(.invalidArgument) {
            try unsafe bytes.withUnsafeBytes { bytes in
              try unsafe memory.file.write(.init(rebasing: bytes[..<length]), at: offset)
            }
          }
        }
        let end = SharedGuestMemory.pageCount
        try expectErrno(.invalidArgument) { try memory.write([1], at: end) }
        try expectErrno(.invalidArgument) { try memory.write([1, 1], at: end - 1) }
      },
      Scenario("write: a source that cannot be read leaves nothing behind") {
        let memory = try SharedGuestMemory()
        let source = try Mapping(anonymous: 3 * 4096)
        unsafe source.pointer.initializeMemory(as: UInt8.self, repeating: 1, count: 4096)
        try source.punchOut(offset: 4096, length: 4096)
        // The second page of three is bad: the first one counts, the others are absent.
        let bytes = unsafe UnsafeRawBufferPointer(start: source.pointer, count: 3 * 4096)
        try expect(try unsafe memory.file.write(bytes, at: 0), 4096, "a pwrite across")
        let bad = unsafe UnsafeRawBufferPointer(rebasing: bytes[4096..<8192])
        try expectErrno(.badAddress) {
          try unsafe memory.file.write(bad, at: 4 * 4096)
        }
        let userfaultfd = try memory.watch([.missing, .minor])
        var reader = FaultReader()
        for page in [1, 2, 4] {
          _ = try Toucher(memory.address(page))
          try reader.expect(userfaultfd, at: memory.address(page), isMinor: false)
          try require(userfaultfd.zeropage(memory.range(page)).obstacle == nil, "ZEROPAGE")
        }
      },
      Scenario("write: many writers of one page: one wins, its content stays") {
        let memory = try SharedGuestMemory()
        for page in 0..<SharedGuestMemory.pageCount {
          let writers = try (0..<4).map { try PageWriter(memory, page, UInt64($0) + 1) }
          let winners = writers.indices.filter { writers[$0].outcome() == .written }
          try expect(winners.count, 1, "writers of page \(page)")
          let found = try Toucher(memory.address(page)).outcome()
          try expect(found, .value(UInt64(winners[0]) + 1), "page \(page)")
        }
      },
      Scenario("write: without the flag the file refuses it", on: [.patched, .unpatched]) {
        let memory = try SharedGuestMemory(flags: [.mmap, .initShared])
        do throws(Errno) {
          _ = try memory.write([1], at: 0)
        } catch {
          return try require(
            error == .invalidArgument || error == .illegalSeek, "it failed with \(error)")
        }
        throw Mismatch(description: "it wrote")
      },
      Scenario("write: the flag needs INIT_SHARED") {
        let machine = try VirtualMachine(KVMSystem())
        try expectErrno(.invalidArgument) {
          _ = try machine.makeGuestMemfd(length: 4096, flags: [.mmap, .write])
          return 0
        }
      },
    ]
  }

  private static func expectErrno(_ expected: Errno, _ body: () throws -> Int) throws {
    let count: Int
    do {
      count = try body()
    } catch let error as Errno {
      return try expect(error, expected, "the error")
    }
    throw Mismatch(description: "it returned \(count) instead of failing with \(expected)")
  }
}
