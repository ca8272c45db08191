// SPDX-License-Identifier: Apache-2.0

import Foundation
import LinuxSystem
import MemoryImage
import MemoryImport
import SystemPackage
import TestSupport
import Testing

@Suite("An ELF core is memory at the addresses that it says")
struct CoreTests {
  private typealias Segment = CoreBuilder.Segment

  private func withCore(_ builder: CoreBuilder, _ body: (FilePath) throws -> Void) throws {
    try withBytes(builder.encoded(), body)
  }

  private func withBytes(_ bytes: [UInt8], _ body: (FilePath) throws -> Void) throws {
    try withDirectory { directory in
      let path = directory.appending("core")
      try makeFile(path, bytes)
      try body(path)
    }
  }

  private func pages(_ count: Int, _ byte: UInt8) -> [UInt8] {
    [UInt8](repeating: byte, count: count * 4096)
  }

  // MARK: - What is read

  @Test("Segments in any order become regions by address; neighbours are one")
  func order() throws {
    var builder = CoreBuilder()
    builder.segments = [
      Segment(address: 0x10_0000, otherAddress: 7, bytes: pages(2, 1)),
      Segment(address: 0, bytes: pages(3, 2)),
      Segment(address: 0x10_2000, bytes: pages(1, 3)),
      Segment(address: 0xf_f000, bytes: pages(1, 4)),
      Segment(address: UInt64.max - 4095, bytes: pages(1, 5)),
    ]
    for _ in 0..<4 {
      try withCore(builder) { path in
        let core = try CoreFile(path)
        #expect(core.kind == .guest)
        #expect(core.absentBytes == 0)
        let input = core.input
        #expect(
          input.regions.map { [$0.guestAddress.rawValue, UInt64($0.length)] }
            == [[0, 12288], [0xf_f000, 16384], [UInt64.max - 4095, 4096]])
        #expect(input.regions.map(\.name) == ["ram@0x0", "ram@0xff000", "ram@0xfffffffffffff000"])
        #expect(try input.bytes(region: 0) == pages(3, 2))
        #expect(try input.bytes(region: 1) == pages(1, 4) + pages(2, 1) + pages(1, 3))
        #expect(try input.bytes(region: 2) == pages(1, 5))
        #expect(try input.bytes(region: 1, offset: 4095, count: 2).bytes == [4, 1])
      }
      builder.segments.append(builder.segments.removeFirst())
    }
  }

  @Test("A core without a note of QEMU's and without physical addresses is a process's")
  func process() throws {
    var builder = CoreBuilder(isGuest: false)
    builder.segments = [Segment(address: 0x7fff_0000_0000, bytes: pages(1, 1))]
    try withCore(builder) { path in
      let core = try CoreFile(path)
      #expect(core.kind == .process)
      #expect(core.input.regions[0].guestAddress == GuestAddress(0x7fff_0000_0000))
      #expect(core.input.regions[0].name == "map@0x7fff00000000")
    }
    builder.segments[0].otherAddress = 0x1000
    try withCore(builder) { path in
      let error = importError { _ = try CoreFile(path) }
      #expect(error?.code == .unsupported)
      #expect(error?.description.contains("p_paddr") == true)
      #expect(try CoreFile(path, kind: .guest).input.regions[0].guestAddress.rawValue == 0x1000)
      let process = try CoreFile(path, kind: .process)
      #expect(process.input.regions[0].name == "map@0x7fff00000000")
    }
  }

  @Test("What a process's segment lacks in the file is zeros, and counted")
  func absent() throws {
    var builder = CoreBuilder(isGuest: false)
    builder.segments = [
      Segment(address: 0x1000, bytes: [1, 2, 3], memoryLength: 8192),
      Segment(address: 0x3000, memoryLength: 4096, fileOffset: .max),
      Segment(address: 0x4000, bytes: pages(1, 9)),
      Segment(address: 0x9000, memoryLength: 0),
    ]
    try withCore(builder) { path in
      let core = try CoreFile(path)
      #expect(core.absentBytes == 8189 + 4096)
      #expect(core.input.regions.map(\.length) == [16384])
      let expected = [1, 2, 3] + [UInt8](repeating: 0, count: 12285) + pages(1, 9)
      #expect(try core.input.bytes(region: 0) == expected)
    }
  }

  @Test("What a guest's segment lacks in the file is refused: it may not be zeros")
  func absentGuest() throws {
    var builder = CoreBuilder()
    builder.segments = [Segment(address: 0, bytes: pages(1, 1), memoryLength: 8192)]
    try withCore(builder) { path in
      let error = importError { _ = try CoreFile(path) }
      #expect(error?.code == .unsupported)
      #expect(error?.description.contains("without -p") == true)
    }
  }

  @Test("Segments of a guest may overlap in the same bytes of the file")
  func aliases() throws {
    var builder = CoreBuilder()
    builder.segments = [Segment(address: 0x1000, otherAddress: 0xc000_0000, bytes: pages(4, 1))]
    let start = UInt64(builder.encoded().count - 16384) + 56 * 3
    for (address, length) in [(0x1000, 4), (0x2000, 2), (0x3000, 2)] as [(UInt64, UInt64)] {
      builder.segments.append(
        Segment(
          address: address, otherAddress: address, memoryLength: length * 4096,
          fileLength: length * 4096, fileOffset: start + address - 0x1000))
    }
    try withCore(builder) { path in
      let core = try CoreFile(path)
      #expect(core.input.regions.map(\.length) == [16384])
      #expect(try core.input.bytes(region: 0) == pages(4, 1))
    }
    builder.segments[3].fileOffset = start
    try withCore(builder) { path in
      let error = importError { _ = try CoreFile(path) }
      #expect(error?.code == .overlap)
      #expect(error?.fileOffset == 128 + 4 * 56)
    }
    // Of a process's virtual addresses it is refused.
    builder.segments[3].fileOffset = start + 0x2000
    try withCore(builder) { path in
      #expect(importError { _ = try CoreFile(path, kind: .process) }?.code == .overlap)
    }
  }

  @Test("More segments than e_phnum can say are counted in a section header")
  func extended() throws {
    var builder = CoreBuilder()
    builder.isExtended = true
    builder.segments = (0..<70_000).map {
      Segment(address: UInt64($0) * 8192, memoryLength: 4096, fileLength: 4096)
    }
    var bytes = builder.encoded()
    // All have the same bytes; each is a region of its own.
    let place = UInt64(bytes.count)
    for number in 1...70_000 { bytes.set(128 + number * 56 + 8, place) }
    bytes += pages(1, 8)
    try withBytes(bytes) { path in
      let core = try CoreFile(path)
      #expect(core.input.regions.count == 70_000)
      #expect(core.input.regions[69_999].guestAddress.rawValue == 69_999 * 8192)
      #expect(try core.input.bytes(region: 69_999) == pages(1, 8))
    }
  }

  @Test("Notes are kept")
  func notes() throws {
    var builder = CoreBuilder()
    builder.segments = [
      Segment(address: 0, bytes: pages(1, 1)),
      Segment(type: 4, bytes: CoreBuilder.note(owner: "VMCOREINFO", type: 0, [1, 2])),
    ]
    try withCore(builder) { path in
      let core = try CoreFile(path)
      #expect(core.noteSegments.count == 2)
      #expect(try core.bytes(of: core.noteSegments[0]) == builder.notes)
      #expect(try core.bytes(of: core.noteSegments[1]) == builder.segments[1].bytes)
    }
  }

  @Test("QEMU's machine for a guest that is not in 64-bit mode is read")
  func realMode() throws {
    var builder = CoreBuilder(machine: 3)
    builder.segments = [Segment(address: 0, bytes: pages(1, 1))]
    try withCore(builder) { path in
      let core = try CoreFile(path)
      #expect(core.kind == .guest)
    }
  }

  // MARK: - What is refused

  /// A change to a core of two segments, and what it is refused for.
  struct Damage: Sendable, CustomTestStringConvertible {
    let testDescription: String
    let code: ImportError.Code
    let change: @Sendable (inout [UInt8]) -> Void

    init(
      _ name: String, _ code: ImportError.Code,
      _ change: @escaping @Sendable (inout [UInt8]) -> Void
    ) {
      testDescription = name
      self.code = code
      self.change = change
    }
  }

  /// Offsets of program headers: the notes, and two segments of memory.
  private static let note = 128
  private static let first = 128 + 56
  private static let second = 128 + 112

  static let damages = [
    Damage("empty", .notACore) { $0 = [] },
    Damage("a text", .notACore) { $0 = Array("faultline".utf8) },
    Damage("half a header", .truncated) { $0 = Array($0[..<40]) },
    Damage("ELF32", .unsupported) { $0[4] = 1 },
    Damage("class 0", .unsupported) { $0[4] = 0 },
    Damage("big-endian", .unsupported) { $0[5] = 2 },
    Damage("version 2", .unsupported) { $0[6] = 2 },
    Damage("a program", .notACore) { $0.set(16, 2 as UInt16) },
    Damage("AArch64", .unsupported) { $0.set(18, 183 as UInt16) },
    Damage("entries of 32 bytes", .invalidLayout) { $0.set(54, 32 as UInt16) },
    Damage("no segments", .invalidLayout) { $0.set(56, 0 as UInt16) },
    Damage("only notes", .invalidLayout) { $0.set(56, 1 as UInt16) },
    Damage("more headers than the file has", .truncated) { $0.set(56, 60_000 as UInt16) },
    Damage("headers past the end", .truncated) { $0.set(32, 1 << 40 as UInt64) },
    Damage("headers at the last offset", .truncated) { $0.set(32, UInt64.max) },
    Damage("PN_XNUM without a section", .truncated) {
      $0.set(56, 0xffff as UInt16)
      $0.set(40, 0 as UInt64)
    },
    Damage("PN_XNUM with a section past the end", .truncated) {
      $0.set(56, 0xffff as UInt16)
      $0.set(40, UInt64.max - 3)
    },
    Damage("four billion segments", .limitExceeded) {
      $0.set(56, 0xffff as UInt16)
      $0.set(64 + 44, UInt32.max)
    },
    Damage("truncated by a byte", .truncated) { $0.removeLast() },
    Damage("an offset past the end", .truncated) { $0.set(first + 8, 1 << 62 as UInt64) },
    Damage("an offset that overflows", .truncated) { $0.set(first + 8, UInt64.max - 4095) },
    Damage("more in the file than in memory", .invalidLayout) {
      $0.set(first + 32, 16384 as UInt64)
    },
    Damage("a length in the file that overflows", .invalidLayout) {
      $0.set(first + 32, UInt64.max)
    },
    Damage("a length in memory that overflows", .limitExceeded) {
      $0.set(first + 40, UInt64.max - 4095)
    },
    Damage("too much memory together", .limitExceeded) {
      $0.set(first + 40, 1 << 50 as UInt64)
    },
    Damage("an odd length", .invalidLayout) {
      $0.set(first + 32, 4095 as UInt64)
      $0.set(first + 40, 4095 as UInt64)
    },
    Damage("an odd address", .invalidLayout) { $0.set(first + 24, 8 as UInt64) },
    Damage("an address that overflows", .invalidLayout) {
      $0.set(second + 24, UInt64.max - 4095)
    },
    Damage("the same address twice", .overlap) { $0.set(second + 24, 0x1000 as UInt64) },
    Damage("an overlap of a page", .overlap) { $0.set(second + 24, 0x2000 as UInt64) },
    Damage("notes past the end", .truncated) { $0.set(note + 32, 1 << 30 as UInt64) },
    Damage("a note longer than its segment", .invalidLayout) {
      $0.set(128 + 3 * 56, UInt32.max)
    },
    Damage("a note whose content is too long", .invalidLayout) {
      $0.set(128 + 3 * 56 + 4, UInt32.max)
    },
  ]

  @Test("A core that lies is refused, with a text that has its name", arguments: damages)
  func hostile(_ damage: Damage) throws {
    var builder = CoreBuilder()
    builder.segments = [
      Segment(address: 0x1000, bytes: pages(2, 1)), Segment(address: 0x8000, bytes: pages(2, 2)),
    ]
    var bytes = builder.encoded()
    damage.change(&bytes)
    try withBytes(bytes) { path in
      let error = importError { _ = try CoreFile(path) }
      #expect(error?.code == damage.code, "\(error.map { $0.description } ?? "")")
      #expect(error?.description.hasPrefix("\(path)") == true)
    }
  }

  @Test(
    "Other formats are refused by their name",
    arguments: [
      ("KDUMP   ", "kdump-compressed"), ("makedumpfile\0\0\0\0", "kdump-compressed"),
      ("PAGEDU64", "Windows"), ("QEVM", "migration stream"), ("\u{1f}", "ELF"),
    ])
  func foreign(magic: String, name: String) throws {
    try withBytes(Array(magic.utf8) + pages(1, 0)) { path in
      let error = importError { _ = try CoreFile(path) }
      #expect(error?.description.contains(name) == true)
    }
  }

  @Test("Notes of more than the limit are refused without reading them")
  func manyNotes() throws {
    var builder = CoreBuilder()
    builder.segments = [
      Segment(address: 0, bytes: pages(1, 1)),
      Segment(type: 4, fileLength: 65 << 20, fileOffset: 0),
    ]
    let bytes = builder.encoded()
    try withDirectory { directory in
      let path = directory.appending("core")
      try makeFile(path, length: 1 << 40, [Part(offset: 0, bytes: bytes)])
      #expect(importError { _ = try CoreFile(path) }?.code == .limitExceeded)
    }
  }
}
