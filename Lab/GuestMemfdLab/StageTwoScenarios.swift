// SPDX-License-Identifier: Apache-2.0

import KVM
import LinuxSystem
import SystemPackage
import Userfault

/// What a vCPU sees of a slot that is bound to a guest_memfd.
enum StageTwoScenarios {
  static var all: [Scenario] {
    [
      Scenario("stage 2: a set bit is an exit, and nothing is allocated") {
        let bitmap = try UserfaultBitmap(pageCount: SharedGuestMemory.pageCount, allSet: true)
        let machine = try BoundMachine(userfaults: bitmap)
        let userfaultfd = try machine.memory.watch([.missing, .minor])
        var reader = FaultReader()
        let exit = try machine.read(20)
        try expect(
          exit,
          .memoryFault(
            address: BoundMachine.guestAddress(20), size: 4096, flags: .userfault), "the exit")
        try expect(try machine.resume(), exit, "running again without an answer")
        try reader.expectNone(userfaultfd)
        // Absent still: a write finds nothing there.
        try expect(try machine.memory.write([31], at: 20), 4096, "pwrite")
        bitmap.clear(20)
        try machine.expect(try machine.resume(), reads: 31)
        // The vCPU has it; the user mapping does not, and its fault is a minor one.
        let toucher = try Toucher(machine.memory.address(20))
        try reader.expect(userfaultfd, at: machine.memory.address(20), isMinor: true)
        try require(userfaultfd.continue(machine.memory.range(20)).obstacle == nil, "CONTINUE")
        try expect(toucher.outcome(), .value(31), "the access")
      },
      Scenario("stage 2: a page that UFFDIO_COPY filled is what the vCPU reads") {
        let bitmap = try UserfaultBitmap(pageCount: SharedGuestMemory.pageCount, allSet: true)
        let machine = try BoundMachine(userfaults: bitmap)
        let userfaultfd = try machine.memory.watch([.missing, .minor])
        let bytes = Pages.of([37])
        try unsafe bytes.withUnsafeBytes { bytes in
          guard let start = bytes.baseAddress else { return }
          let done = unsafe userfaultfd.copy(
            from: start, to: machine.memory.address(5), length: 4096)
          try require(done.obstacle == nil, "COPY")
        }
        bitmap.clear(5)
        try machine.expect(try machine.read(5), reads: 37)
      },
      Scenario("stage 2: each page of the slot asks for itself, once") {
        let bitmap = try UserfaultBitmap(pageCount: SharedGuestMemory.pageCount, allSet: true)
        let machine = try BoundMachine(userfaults: bitmap)
        for page in 0..<SharedGuestMemory.pageCount {
          let exit = try machine.read(page)
          try expect(
            exit,
            .memoryFault(
              address: BoundMachine.guestAddress(page), size: 4096, flags: .userfault), "page")
          try expect(try machine.memory.write([UInt64(page) + 100], at: page), 4096, "pwrite")
          bitmap.clear(page)
          try machine.expect(try machine.resume(), reads: UInt64(page) + 100)
        }
        for page in 0..<SharedGuestMemory.pageCount {
          try machine.expect(try machine.read(page), reads: UInt64(page) + 100)
        }
      },
      Scenario("stage 2: without a bitmap a vCPU gets zeros, unseen", on: [.patched, .unpatched]) {
        let machine = try BoundMachine(userfaults: nil, flags: [.mmap, .initShared])
        try machine.expect(try machine.read(3), reads: 0)
      },
      Scenario("stage 2: a clear bit lets an absent page in as zeros; missing is lost") {
        let bitmap = try UserfaultBitmap(pageCount: SharedGuestMemory.pageCount, allSet: false)
        let machine = try BoundMachine(userfaults: bitmap)
        let userfaultfd = try machine.memory.watch([.missing, .minor])
        var reader = FaultReader()
        try machine.expect(try machine.read(3), reads: 0)
        try reader.expectNone(userfaultfd)
        let toucher = try Toucher(machine.memory.address(3))
        try reader.expect(userfaultfd, at: machine.memory.address(3), isMinor: true)
        try require(userfaultfd.continue(machine.memory.range(3)).obstacle == nil, "CONTINUE")
        try expect(toucher.outcome(), .value(0), "the access")
      },
      Scenario("stage 2: a bit that is set after the page was mapped has no effect") {
        let bitmap = try UserfaultBitmap(pageCount: SharedGuestMemory.pageCount, allSet: false)
        let machine = try BoundMachine(userfaults: bitmap)
        try machine.expect(try machine.read(3), reads: 0)
        bitmap.set(3)
        try machine.expect(try machine.read(3), reads: 0)
      },
      Scenario("stage 2: a hole that is punched makes the vCPU ask again") {
        let bitmap = try UserfaultBitmap(pageCount: SharedGuestMemory.pageCount, allSet: false)
        let machine = try BoundMachine(userfaults: bitmap)
        try expect(try machine.memory.write([41], at: 3), 4096, "pwrite")
        try machine.expect(try machine.read(3), reads: 41)
        bitmap.set(3)
        try machine.memory.mapping.advise(.remove, offset: 3 * 4096, length: 4096)
        guard case .memoryFault(_, _, .userfault) = try machine.read(3) else {
          throw Mismatch(description: "the vCPU did not ask")
        }
      },
      Scenario("stage 2: the flag is refused", on: [.unpatched]) {
        let bitmap = try UserfaultBitmap(pageCount: SharedGuestMemory.pageCount, allSet: true)
        let memory = try SharedGuestMemory(flags: [.mmap, .initShared])
        do throws(Errno) {
          try memory.machine.setMemory(
            slot: 0, at: GuestAddress(0), to: memory.mapping.range, guestMemfd: memory.file,
            offset: 0, userfaults: bitmap)
        } catch {
          return try expect(error, .invalidArgument, "the error")
        }
        throw Mismatch(description: "it was accepted")
      },
    ]
  }
}
