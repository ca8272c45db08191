// SPDX-License-Identifier: Apache-2.0

import Foundation
import LinuxSystem
import MemoryImage
import MemoryImport
import SystemPackage
import TestSupport
import Testing

@Suite("A raw file is guest memory, holes and all")
struct RawTests {
  @Test("Any part of a region reads as the file does", arguments: [1, 2, 3, 4])
  func positionedReads(seed: UInt64) throws {
    try withDirectory { directory in
      var random = Random(seed: seed)
      let path = directory.appending("memory")
      // Odd places: the file's parts need not end where its blocks do.
      let parts =
        randomParts(pages: 60, &random) + [
          Part(offset: 200_001, bytes: [7]), Part(offset: 64 * 4096 - 1, bytes: [9]),
        ]
      try makeFile(path, length: 64 * 4096, parts)
      let expected = try contents(of: path)
      let input = try MemoryInput.raw(path)
      #expect(input.regions.map(\.length) == [64 * 4096])
      #expect(input.length == 64 * 4096)
      #expect(input.files == [path])
      #expect(try input.bytes(region: 0) == expected)
      for _ in 0..<200 {
        let offset = Int.random(in: 0...expected.count, using: &random)
        let count = Int.random(in: 0...min(30_000, expected.count - offset), using: &random)
        let found = try input.bytes(region: 0, offset: offset, count: count)
        #expect(found.bytes == Array(expected[offset..<offset + count]))
        #expect(found.hasData || found.bytes.allSatisfy { $0 == 0 })
      }
    }
  }

  @Test("Holes are extents of nothing")
  func extents() throws {
    try withDirectory { directory in
      let path = directory.appending("memory")
      var random = Random(seed: 1)
      try makeFile(
        path, length: 1 << 20,
        [
          Part(offset: 4096 * 3, bytes: random.bytes(8192)),
          Part(offset: 4096 * 9, bytes: random.bytes(1)),
        ])
      let input = try MemoryInput.raw(path)
      #expect(
        try input.extents(region: 0).map { [$0.offset, $0.length, $0.file, $0.fileOffset] }
          == [[12288, 8192, 0, 12288], [36864, 4096, 0, 36864]])
      #expect(try input.nextExtent(region: 0, from: 15000, limit: 15001)?.length == 1)
      #expect(try input.nextExtent(region: 0, from: 40960) == nil)
      #expect(try !input.bytes(region: 0, offset: 20480, count: 4096).hasData)
    }
  }

  @Test("A file without data is zeros, however long", arguments: [4096, 64 << 30])
  func onlyHoles(length: Int) throws {
    try withDirectory { directory in
      let path = directory.appending("memory")
      try makeFile(path, length: length)
      let input = try MemoryInput.raw(path)
      #expect(try input.extents(region: 0).isEmpty)
      let end = try input.bytes(region: 0, offset: length - 4096, count: 4096)
      #expect(end.bytes.allSatisfy { $0 == 0 } && !end.hasData)
    }
  }

  @Test("Firecracker's memory goes around the gaps of its age")
  func firecrackerLayouts() throws {
    let gib = 1 << 30
    let cases: [(FirecrackerGap, Int, [[Int]])] = [
      (.from3GiB, gib, [[0, gib]]),
      (.from3GiB, 3 * gib, [[0, 3 * gib]]),
      (.from3GiB, 3 * gib + 8192, [[0, 3 * gib], [4 * gib, 8192]]),
      (
        .from3GiB, 255 * gib + 4096,
        [[0, 3 * gib], [4 * gib, 252 * gib], [512 * gib, 4096]]
      ),
      (.from3328MiB, 3328 << 20, [[0, 3328 << 20]]),
      (.from3328MiB, 300 * gib, [[0, 3328 << 20], [4 * gib, 300 * gib - 3328 << 20]]),
    ]
    try withDirectory { directory in
      let path = directory.appending("memory")
      for (gap, length, regions) in cases {
        try makeFile(path, length: length, [Part(offset: length - 4096, bytes: [1, 2, 3])])
        let input = try MemoryInput.raw(path, layout: .firecracker(gap: gap))
        #expect(input.regions.map { [Int($0.guestAddress.rawValue), $0.length] } == regions)
        let last = input.regions.count - 1
        let offset = input.regions[last].length - 4096
        #expect(
          try input.bytes(region: last, offset: offset, count: 4).bytes == [1, 2, 3, 0])
        #expect(try input.extents(region: last).map(\.fileOffset) == [length - 4096])
      }
    }
  }

  @Test("Regions of the caller's are taken from the file one after the other")
  func split() throws {
    try withDirectory { directory in
      let path = directory.appending("memory")
      var random = Random(seed: 3)
      let bytes = random.bytes(10 * 4096)
      try makeFile(path, bytes)
      let input = try MemoryInput.raw(path, layout: .regions(regions([(0x10000, 7), (0, 3)])))
      #expect(try input.bytes(region: 0) == Array(bytes[..<(7 * 4096)]))
      #expect(try input.bytes(region: 1) == Array(bytes[(7 * 4096)...]))
    }
  }

  /// Regions (address, pages) that do not go with a file of four pages.
  struct BadSplit: Sendable {
    let parts: [(UInt64, Int)]
    let code: ImportError.Code
  }

  @Test(
    "Regions that do not fit their file are refused",
    arguments: [
      BadSplit(parts: [(0, 3)], code: .lengthMismatch),
      BadSplit(parts: [(0, 5)], code: .lengthMismatch),
      BadSplit(parts: [], code: .lengthMismatch),
      BadSplit(parts: [(0, 3), (0x2000, 1)], code: .overlap),
      BadSplit(parts: [(0, 0), (0, 4)], code: .invalidLayout),
      BadSplit(parts: [(1, 4)], code: .invalidLayout),
      BadSplit(parts: [(UInt64.max - 4095, 4)], code: .invalidLayout),
      BadSplit(parts: [(0, -4), (0x8000, 8)], code: .invalidLayout),
    ])
  func badSplit(_ split: BadSplit) throws {
    try withDirectory { directory in
      let path = directory.appending("memory")
      try makeFile(path, length: 4 * 4096)
      let error = importError {
        _ = try MemoryInput.raw(path, layout: .regions(regions(split.parts)))
      }
      #expect(error?.code == split.code)
      #expect(error?.path == path)
    }
  }

  @Test("A file that is not whole pages is refused", arguments: [0, 1, 4095, 4097])
  func odd(length: Int) throws {
    try withDirectory { directory in
      let path = directory.appending("memory")
      try makeFile(path, length: length)
      let error = importError { _ = try MemoryInput.raw(path) }
      #expect(error?.code == .invalidLayout)
      #expect(error?.description.contains("\(length) bytes") == true)
    }
  }

  @Test("Pages of 2 MiB want a file of whole ones")
  func hugePages() throws {
    try withDirectory { directory in
      let path = directory.appending("memory")
      try makeFile(path, length: 3 << 20)
      let layout = FlatLayout.contiguous(pageSize: .size2MiB)
      #expect(importError { _ = try MemoryInput.raw(path, layout: layout) }?.code == .invalidLayout)
      try makeFile(path, length: 4 << 20)
      #expect(try MemoryInput.raw(path, layout: layout).regions[0].pageSize == .size2MiB)
    }
  }

  @Test(
    "What is no regular file is refused, at once",
    arguments: ["directory", "fifo", "/dev/zero", "/dev/null"])
  func irregular(kind: String) throws {
    try withDirectory { directory in
      let path = kind.hasPrefix("/") ? FilePath(kind) : directory.appending(kind)
      switch kind {
      case "directory":
        try FileManager.default.createDirectory(
          atPath: path.string, withIntermediateDirectories: false)
      case "fifo": #expect(unsafe mkfifo(path.string, 0o600) == 0)
      default: break
      }
      #expect(importError { _ = try MemoryInput.raw(path) }?.code == .notRegular)
      #expect(importError { _ = try MemoryInput.firecracker(memory: path) }?.code == .notRegular)
      #expect(importError { _ = try CoreFile(path) }?.code == .notRegular)
    }
  }

  @Test("A file that is not there is an error with its name")
  func missing() {
    let error = importError { _ = try MemoryInput.raw("/nowhere/memory") }
    #expect(error?.code == .inputOutput)
    #expect(error?.errno == .noSuchFileOrDirectory)
    #expect(error?.description.hasPrefix("/nowhere/memory: ") == true)
  }

  @Test("Bytes that a region does not have are refused")
  func outOfRange() throws {
    try withDirectory { directory in
      let path = directory.appending("memory")
      try makeFile(path, length: 8192)
      let input = try MemoryInput.raw(path)
      for (region, offset, count) in [
        (1, 0, 1), (-1, 0, 1), (0, 8192, 1), (0, -1, 2), (0, 1, 8192),
      ] {
        let error = importError {
          _ = try input.bytes(region: region, offset: offset, count: count)
        }
        #expect(error?.code == .outOfRange)
      }
      #expect(importError { _ = try input.nextExtent(region: 0, from: 9000) }?.code == .outOfRange)
      #expect(try input.bytes(region: 0, offset: 8192, count: 0).bytes.isEmpty)
    }
  }

  @Test("A file that is cut while it is read is an error, not zeros", arguments: [true, false])
  func cut(isSparse: Bool) throws {
    try withDirectory { directory in
      let path = directory.appending("memory")
      var random = Random(seed: 1)
      try makeFile(
        path, length: 1 << 20, isSparse ? [] : [Part(offset: 0, bytes: random.bytes(1 << 20))])
      let input = try MemoryInput.raw(path)
      try FileHandle(forWritingTo: URL(fileURLWithPath: path.string)).truncate(atOffset: 4096)
      let error = importError { _ = try input.bytes(region: 0) }
      #expect(error?.code == .changed)
    }
  }

  private func regions(_ parts: [(UInt64, Int)]) -> [ImageRegion] {
    parts.enumerated().map { number, part in
      ImageRegion(
        name: "part\(number)", guestAddress: GuestAddress(part.0), length: part.1 * 4096,
        pageSize: .size4KiB)
    }
  }
}
