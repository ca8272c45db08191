// SPDX-License-Identifier: Apache-2.0

import Foundation
import LinuxSystem
import MemoryImage
import MemoryImport
import SystemPackage
import TestSupport
import Testing

private let gcore = program("gcore")
private let qemu = program("qemu-system-x86_64")

@Suite("Cores of real programs hold what the memory held")
struct RealCoreTests {
  // MARK: - gcore

  @Test(
    "gcore's core of a process is its memory",
    .enabled(if: gcore != nil, "gcore is not installed (package gdb)"),
    .enabled(if: Host.hasPrivileges, "attaching to a process takes root"))
  func process() throws {
    let gcore = try #require(gcore)
    // On one processor: the kernel writes the number of the current one into the process's
    // memory (rseq(2)), and else nothing changes there.
    let taskset = try #require(program("taskset"))
    try withDirectory { directory in
      let process = Process()
      process.executableURL = URL(fileURLWithPath: taskset)
      process.arguments = ["-c", try allowedProcessor(), "sleep", "600"]
      try launch(process)
      defer {
        kill(process.processIdentifier, SIGKILL)
        process.waitUntilExit()
      }
      let number = process.processIdentifier
      try waitUntilAsleep(number)
      try #require(run(gcore, ["-o", directory.appending("core").string, "\(number)"]) == 0)
      let core = try CoreFile(directory.appending("core.\(number)"))
      #expect(core.kind == .process)
      let notes = try core.noteSegments.map { try core.bytes(of: $0) }
      #expect(notes.count == 1 && notes[0].starts(with: [5, 0, 0, 0]))

      // The process sleeps, so its memory is what it was.
      let memory = try OwnedDescriptor(openingForReading: FilePath("/proc/\(number)/mem"))
      var compared = 0
      for (index, region) in core.input.regions.enumerated() {
        // The kernel's own page is no memory of the process (vsyscall).
        guard region.guestAddress.rawValue < 1 << 47 else { continue }
        for extent in try core.input.extents(region: index) {
          let found = try core.input.bytes(
            region: index, offset: extent.offset, count: extent.length
          ).bytes
          var expected = [UInt8](repeating: 0, count: extent.length)
          let address = Int(region.guestAddress.rawValue) + extent.offset
          do throws(Errno) {
            try unsafe expected.withUnsafeMutableBufferPointer { (buffer) throws(Errno) in
              try unsafe memory.readAll(into: UnsafeMutableRawBufferPointer(buffer), at: address)
            }
          } catch {
            // The kernel's data for clocks (vvar) cannot be read so.
            #expect(error == .ioError)
            continue
          }
          let isSame = found == expected
          #expect(isSame, "at \(GuestAddress(UInt64(address)))")
          compared += extent.length
        }
      }
      #expect(compared > 100_000)
    }
  }

  /// The first processor that this process may use.
  private func allowedProcessor() throws -> String {
    let status = try String(contentsOfFile: "/proc/self/status", encoding: .utf8)
    let line = try #require(
      status.split(separator: "\n").first { $0.hasPrefix("Cpus_allowed_list:") })
    return String(line.dropFirst(18).drop { !$0.isNumber }.prefix { $0.isNumber })
  }

  private func waitUntilAsleep(_ number: Int32) throws {
    let deadline = ContinuousClock.now + .seconds(60)
    while ContinuousClock.now < deadline {
      let text = try String(contentsOfFile: "/proc/\(number)/syscall", encoding: .utf8)
      // clock_nanosleep(2)
      if text.hasPrefix("230 ") { return }
      usleep(10_000)
    }
    Issue.record("sleep does not sleep")
  }

  // MARK: - QEMU

  /// Starts a machine with 64 MiB and types commands into its monitor.
  private func runMachine(_ commands: [String], arguments: [String] = ["-S"]) throws {
    let qemu = try #require(qemu)
    let machine = [
      "-machine", "pc", "-accel", "tcg", "-m", "64", "-display", "none", "-vga", "none",
      "-nic", "none", "-monitor", "stdio",
    ]
    let input = (commands + ["quit", ""]).joined(separator: "\n")
    try #require(run(qemu, machine + arguments, input: input) == 0)
  }

  @Test(
    "QEMU's dump of a guest is its memory, with -p where there is no paging, too",
    .enabled(if: qemu != nil, "qemu-system-x86_64 is not installed"), arguments: ["", "-p "])
  func guest(option: String) throws {
    try withDirectory { directory in
      let (path, raw) = (directory.appending("core"), directory.appending("raw"))
      // Content that the firmware did not put there, by the debugger's hand.
      let blob = directory.appending("blob")
      var random = Random(seed: 21)
      let content = random.bytes(3 << 20 + 5)
      try makeFile(blob, content)
      try runMachine(
        ["dump-guest-memory \(option)\(path)", "pmemsave 0 0x4000000 \"\(raw)\""],
        arguments: ["-S", "-device", "loader,file=\(blob),addr=0x1800000,force-raw=on"])
      let core = try CoreFile(path)
      #expect(core.kind == .guest)
      #expect(core.absentBytes == 0)
      let memory = try MemoryInput.raw(raw)
      let inside = core.input.regions.indices.filter {
        core.input.regions[$0].guestAddress.rawValue < 64 << 20
      }
      #expect(inside.reduce(0) { $0 + core.input.regions[$1].length } >= 63 << 20)
      for number in inside {
        let region = core.input.regions[number]
        let address = Int(region.guestAddress.rawValue)
        #expect(
          try core.input.bytes(region: number)
            == memory.bytes(region: 0, offset: address, count: region.length).bytes)
        if address <= 0x180_0000 {
          let loaded = 0x180_0000..<0x180_0000 + content.count
          guard address + region.length >= loaded.upperBound else { continue }
          #expect(
            try core.input.bytes(
              region: number, offset: loaded.lowerBound - address, count: content.count
            ).bytes == content)
        }
      }
      // What lies between the regions is the devices'; export leaves holes there.
      let copy = directory.appending("copy")
      try RawExport.write(core.input, to: copy, arrangement: .byAddress())
      let first = try MemoryInput.raw(copy).bytes(region: 0, offset: 0, count: 0xa0000).bytes
      #expect(try first == memory.bytes(region: 0, offset: 0, count: 0xa0000).bytes)
    }
  }

  @Test(
    "QEMU's dump with -p of a guest with paging does not say where all is, and is refused",
    .enabled(if: qemu != nil, "qemu-system-x86_64 is not installed"))
  func paging() throws {
    try withDirectory { directory in
      let (kernel, path) = (directory.appending("kernel"), directory.appending("core"))
      try makeFile(kernel, Self.pagingKernel)
      let plain = directory.appending("plain")
      // The monitor does not wait for the guest: so it is asked again until it pages.
      let reached = try (1...10).contains { seconds in
        try dumpRunning(kernel, [path, plain], seconds: seconds)
        return importError { _ = try CoreFile(path) }?.code == .unsupported
      }
      #expect(reached)
      let error = importError { _ = try CoreFile(path) }
      #expect(error?.description.contains("without -p") == true)
      let core = try CoreFile(plain)
      #expect(core.input.regions.contains { $0.length > 48 << 20 })
      let tables = try core.input.bytes(region: 1, offset: 0x20_0000 - 0xc_0000, count: 8).bytes
      #expect(tables[0] & 0x83 == 0x83, "the guest's page tables")
    }
  }

  /// Lets a kernel run for a while, then dumps it with and without -p.
  private func dumpRunning(
    _ kernel: FilePath, _ paths: [FilePath], seconds: Int
  ) throws {
    let qemu = try #require(qemu)
    let process = Process()
    process.executableURL = URL(fileURLWithPath: qemu)
    process.arguments = [
      "-machine", "pc", "-accel", "tcg", "-m", "64", "-display", "none", "-monitor", "stdio",
      "-kernel", kernel.string,
    ]
    let pipe = Pipe()
    process.standardInput = pipe
    process.standardOutput = FileHandle.nullDevice
    process.standardError = FileHandle.nullDevice
    try launch(process)
    defer {
      if process.isRunning { kill(process.processIdentifier, SIGKILL) }
      process.waitUntilExit()
    }
    usleep(UInt32(seconds) * 1_000_000)
    let commands = "stop\ndump-guest-memory -p \(paths[0])\ndump-guest-memory \(paths[1])\nquit\n"
    try pipe.fileHandleForWriting.write(contentsOf: Data(commands.utf8))
    let deadline = ContinuousClock.now + .seconds(60)
    while process.isRunning, ContinuousClock.now < deadline { usleep(10_000) }
  }

  /// A multiboot kernel of 131 bytes at 1 MiB. It maps 64 MiB as they are and the first 16
  /// again at 3 GiB, with pages of 4 MiB and the page directory at 2 MiB, turns paging on and
  /// halts.
  private static let pagingKernel: [UInt8] = [
    0x02, 0xb0, 0xad, 0x1b, 0x00, 0x00, 0x01, 0x00, 0xfe, 0x4f, 0x51, 0xe4,  // header
    0x00, 0x00, 0x10, 0x00, 0x00, 0x00, 0x10, 0x00, 0x00, 0x00, 0x00, 0x00,
    0x00, 0x00, 0x00, 0x00, 0x20, 0x00, 0x10, 0x00,
    0xbf, 0x00, 0x00, 0x20, 0x00, 0x31, 0xc0,  // mov $0x200000, %edi; xor %eax, %eax
    0xb9, 0x00, 0x04, 0x00, 0x00,
    0xba, 0x83, 0x00, 0x00, 0x00, 0x09, 0xc2, 0x89, 0x17, 0x83, 0xc7, 0x04,
    0x05, 0x00, 0x00, 0x40, 0x00, 0x3d, 0x00, 0x00, 0x00, 0x04, 0x72, 0xe8,
    0xbf, 0x00, 0x0c, 0x20, 0x00, 0x31, 0xc0,  // the entries from 3 GiB on
    0x89, 0xc2, 0x81, 0xca, 0x83, 0x00, 0x00, 0x00, 0x89, 0x17, 0x83, 0xc7, 0x04,
    0x05, 0x00, 0x00, 0x40, 0x00, 0x3d, 0x00, 0x00, 0x00, 0x01, 0x72, 0xe7,
    0x0f, 0x20, 0xe0, 0x83, 0xc8, 0x10, 0x0f, 0x22, 0xe0,  // CR4.PSE
    0xb8, 0x00, 0x00, 0x20, 0x00, 0x0f, 0x22, 0xd8,  // CR3
    0x0f, 0x20, 0xc0, 0x0d, 0x00, 0x00, 0x00, 0x80, 0x0f, 0x22, 0xc0,  // CR0.PG
    0xf4, 0xeb, 0xfd,  // hlt, for ever
  ]

  @Test(
    "QEMU's compressed dump is refused by its name",
    .enabled(if: qemu != nil, "qemu-system-x86_64 is not installed"))
  func compressed() throws {
    try withDirectory { directory in
      let path = directory.appending("core")
      try runMachine(["dump-guest-memory -z \(path)"])
      let error = importError { _ = try CoreFile(path) }
      #expect(error?.code == .unsupported)
      #expect(error?.description.contains("kdump-compressed") == true)
    }
  }
}
