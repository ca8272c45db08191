// SPDX-License-Identifier: Apache-2.0

import KVM
import LinuxSystem
import SystemPackage
import TestSupport
import Testing

@Suite(.enabled(if: Host.hasKVM, "no usable /dev/kvm"))
struct DirtyTests {
  private let done = VCPUExit.portOutput(port: Programs.port, size: 1, count: 1, value: 0x78)

  @Test("The dirty log shows exactly the pages that the guest wrote", arguments: [1, 2, 7])
  func log(_ stride: Int) throws {
    let tiny = try TinyMachine(program: Programs.write, dataFlags: .logDirtyPages)
    let count = 40
    #expect(try tiny.write(pages: 5..<5 + count, stride: stride) == done)
    let expected = (0..<count).map { 5 + $0 * stride }
    // SAFETY: the slot has that many pages.
    let first = unsafe try tiny.machine.dirtyLog(slot: 1, pageCount: TinyMachine.dataPages)
    #expect(first.dirtyPages == expected)
    #expect(first.dirtyCount == count)
    let second = unsafe try tiny.machine.dirtyLog(slot: 1, pageCount: TinyMachine.dataPages)
    #expect(second.dirtyCount == 0)
  }

  @Test("With manual protection a page stays dirty until it is cleared")
  func manual() throws {
    let capabilities = try KVMSystem().capabilities()
    try #require(capabilities.manualDirtyLogProtect.contains(.enable))
    let tiny = try TinyMachine(program: Programs.write) { machine throws(Errno) in
      try machine.enableManualDirtyLogProtect(.enable)
    }
    try tiny.machine.setMemory(
      slot: 1, at: TinyMachine.dataAddress, to: tiny.data.range, flags: .logDirtyPages)
    #expect(try tiny.write(pages: 100..<110) == done)
    for _ in 0..<2 {
      // SAFETY: the slot has that many pages.
      let log = unsafe try tiny.machine.dirtyLog(slot: 1, pageCount: TinyMachine.dataPages)
      #expect(log.dirtyPages == Array(100..<110))
    }
    // SAFETY: the slot has that many pages.
    let log = unsafe try tiny.machine.dirtyLog(slot: 1, pageCount: TinyMachine.dataPages)
    try tiny.machine.clearDirtyLog(slot: 1, log)
    #expect(try tiny.write(pages: 104..<105) == done)
    let after = unsafe try tiny.machine.dirtyLog(slot: 1, pageCount: TinyMachine.dataPages)
    #expect(after.dirtyPages == [104])
  }

  @Test("Initially set, every page counts as dirty at first")
  func initiallySet() throws {
    let capabilities = try KVMSystem().capabilities()
    try #require(capabilities.manualDirtyLogProtect.contains(.initiallySet))
    let tiny = try TinyMachine(program: Programs.write) { machine throws(Errno) in
      try machine.enableManualDirtyLogProtect([.enable, .initiallySet])
    }
    try tiny.machine.setMemory(
      slot: 1, at: TinyMachine.dataAddress, to: tiny.data.range, flags: .logDirtyPages)
    // SAFETY: the slot has that many pages.
    let log = unsafe try tiny.machine.dirtyLog(slot: 1, pageCount: TinyMachine.dataPages)
    #expect(log.dirtyCount == TinyMachine.dataPages)
  }

  @Test("A slot that does not log has no dirty log")
  func noLog() throws {
    let tiny = try TinyMachine(program: Programs.write)
    #expect(throws: Errno.noSuchFileOrDirectory) {
      // SAFETY: the slot has that many pages.
      _ = unsafe try tiny.machine.dirtyLog(slot: 1, pageCount: TinyMachine.dataPages)
    }
  }

  @Test("The dirty ring gives each written page, and again after a reset")
  func ring() throws {
    let entries = 1024
    let tiny = try ringMachine(entries: entries)
    var ring = try DirtyRing(of: tiny.vcpu, entries: entries)
    for _ in 0..<3 {
      #expect(try tiny.write(pages: 20..<30, stride: 3) == done)
      var found: Set<UInt64> = []
      let count = ring.harvest { page in
        if page.slot == 1 { found.insert(page.page) }
      }
      #expect(found == Set((0..<10).map { UInt64(20 + $0 * 3) }))
      #expect(try tiny.machine.resetDirtyRings() == count)
    }
    #expect(ring.harvest { _ in } == 0)
  }

  @Test("A full ring stops the vCPU, and harvesting lets it go on without a loss")
  func fullRing() throws {
    let entries = 1024
    let tiny = try ringMachine(entries: entries)
    var ring = try DirtyRing(of: tiny.vcpu, entries: entries)
    var found = 0
    // Each round is below the ring's size, all of them together are above it.
    var isFull = false
    for _ in 0..<4 {
      var exit = try tiny.write(pages: 0..<TinyMachine.dataPages)
      while exit == .dirtyRingFull {
        isFull = true
        found += ring.harvest { _ in }
        try tiny.machine.resetDirtyRings()
        exit = try tiny.vcpu.run()
      }
      #expect(exit == done)
      // Watches the pages again without freeing the entries.
      try tiny.machine.setMemory(
        slot: 1, at: TinyMachine.dataAddress, to: tiny.data.range)
      try tiny.machine.setMemory(
        slot: 1, at: TinyMachine.dataAddress, to: tiny.data.range, flags: .logDirtyPages)
    }
    found += ring.harvest { _ in }
    #expect(isFull)
    #expect(found >= 4 * TinyMachine.dataPages)
  }

  private func ringMachine(entries: Int) throws -> TinyMachine {
    let largest = try KVMSystem().capabilities().dirtyRingEntries
    try #require(largest >= entries)
    return try TinyMachine(program: Programs.write, dataFlags: .logDirtyPages) {
      machine throws(Errno) in try machine.enableDirtyRings(entries: entries)
    }
  }
}
