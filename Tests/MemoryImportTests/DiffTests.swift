// SPDX-License-Identifier: Apache-2.0

import Foundation
import LinuxSystem
import MemoryImage
import MemoryImport
import Synchronization
import SystemPackage
import TestSupport
import Testing

@Suite("The last diff that has a page wins")
struct DiffTests {
  private static let pages = 96

  /// A base and diffs at random, and what a machine's memory was after the last.
  private func make(
    in directory: FilePath, diffs: Int, seed: UInt64
  ) throws -> (files: [FilePath], oracle: [UInt8]) {
    var random = Random(seed: seed)
    var oracle = [UInt8](repeating: 0, count: Self.pages * 4096)
    var files: [FilePath] = []
    for number in 0...diffs {
      let path = directory.appending("file\(number)")
      var parts = randomParts(pages: Self.pages, &random)
      // A page that the guest cleared is data.
      parts.append(
        Part(
          offset: 4096 * Int.random(in: 0..<Self.pages, using: &random),
          bytes: [UInt8](repeating: 0, count: 4096)))
      try makeFile(path, length: oracle.count, parts)
      for part in parts {
        oracle.replaceSubrange(part.offset..<part.offset + part.bytes.count, with: part.bytes)
      }
      files.append(path)
    }
    return (files, oracle)
  }

  @Test(
    "Memory is what applying the diffs one by one gives",
    arguments: [0, 1, 2, 7, 40], [1, 2, 3] as [UInt64])
  func layers(diffs: Int, seed: UInt64) throws {
    try withDirectory { directory in
      let (files, oracle) = try make(in: directory, diffs: diffs, seed: seed)
      let input = try MemoryInput.firecracker(memory: files[0], diffs: Array(files[1...]))
      #expect(try input.bytes(region: 0) == oracle)
      var random = Random(seed: seed)
      for _ in 0..<50 {
        let offset = Int.random(in: 0..<oracle.count, using: &random)
        let count = Int.random(in: 0...oracle.count - offset, using: &random)
        #expect(
          try input.bytes(region: 0, offset: offset, count: count).bytes
            == Array(oracle[offset..<offset + count]))
      }
      var end = 0
      for extent in try input.extents(region: 0) {
        #expect(extent.offset >= end && extent.length > 0)
        #expect(extent.fileOffset == extent.offset)
        end = extent.offset + extent.length
      }
    }
  }

  @Test("Threads that read at once all read the same")
  func concurrent() throws {
    try withDirectory { directory in
      let (files, oracle) = try make(in: directory, diffs: 3, seed: 11)
      let input = try MemoryInput.firecracker(memory: files[0], diffs: Array(files[1...]))
      let wrong = Atomic<Int>(0)
      DispatchQueue.concurrentPerform(iterations: 8) { thread in
        var random = Random(seed: UInt64(thread))
        for _ in 0..<100 {
          let page = Int.random(in: 0..<Self.pages, using: &random)
          let count = Int.random(in: 1...Self.pages - page, using: &random)
          let range = page * 4096..<(page + count) * 4096
          let found = try? input.bytes(region: 0, offset: range.lowerBound, count: range.count)
          if found?.bytes != Array(oracle[range]) {
            wrong.wrappingAdd(1, ordering: .relaxed)
          }
        }
      }
      #expect(wrong.load(ordering: .relaxed) == 0)
    }
  }

  @Test("Diffs over memory with a gap apply on both sides of it")
  func gap() throws {
    try withDirectory { directory in
      let (base, diff) = (directory.appending("base"), directory.appending("diff"))
      let length = 3 << 30 + 16384
      try makeFile(
        base, length: length,
        [
          Part(offset: 3 << 30 - 4096, bytes: [1]), Part(offset: 3 << 30, bytes: [2]),
          Part(offset: 3 << 30 + 4096, bytes: [3]),
        ])
      try makeFile(
        diff, length: length,
        [Part(offset: 3 << 30 - 4096, bytes: [4]), Part(offset: 3 << 30 + 4096, bytes: [5])])
      let input = try MemoryInput.firecracker(memory: base, diffs: [diff])
      #expect(input.regions.map(\.guestAddress.rawValue) == [0, 4 << 30])
      #expect(try input.bytes(region: 0, offset: 3 << 30 - 4096, count: 1).bytes == [4])
      #expect(try input.bytes(region: 1, offset: 0, count: 1).bytes == [2])
      #expect(try input.bytes(region: 1, offset: 4096, count: 1).bytes == [5])
    }
  }

  @Test("A diff of another length is refused", arguments: [-4096, -1, 1, 4096])
  func otherLength(difference: Int) throws {
    try withDirectory { directory in
      let (base, diff) = (directory.appending("base"), directory.appending("diff"))
      try makeFile(base, length: 65536)
      try makeFile(diff, length: 65536 + difference)
      let error = importError { _ = try MemoryInput.firecracker(memory: base, diffs: [diff]) }
      #expect(error?.code == .lengthMismatch)
      #expect(error?.path == diff)
      #expect(error?.description.contains("\(65536 + difference) bytes") == true)
    }
  }

  @Test("A diff that is all data replaces all")
  func full() throws {
    try withDirectory { directory in
      let (base, diff) = (directory.appending("base"), directory.appending("diff"))
      var random = Random(seed: 5)
      let bytes = random.bytes(65536)
      try makeFile(base, random.bytes(65536))
      try makeFile(diff, bytes)
      let input = try MemoryInput.firecracker(memory: base, diffs: [diff])
      #expect(try input.bytes(region: 0) == bytes)
      #expect(try input.extents(region: 0).map(\.file) == [1])
    }
  }

  @Test("More diffs than the limit are refused before any is opened")
  func tooMany() throws {
    try withDirectory { directory in
      let base = directory.appending("base")
      try makeFile(base, length: 4096)
      let diffs = [FilePath](repeating: "/nowhere", count: ImportLimits.diffs + 1)
      let error = importError { _ = try MemoryInput.firecracker(memory: base, diffs: diffs) }
      #expect(error?.code == .limitExceeded)
    }
  }

  @Test(
    "A diff where single pages are not kept is refused, but not for guests with huge pages",
    .enabled(if: Host.hasPrivileges, "mounting a filesystem takes root"),
    .enabled(
      if: FileManager.default.fileExists(atPath: "/sys/kernel/mm/transparent_hugepage"),
      "this kernel has no transparent huge pages"))
  func largePieces() throws {
    try withDirectory { directory in
      let mounted = directory.appending("huge")
      try FileManager.default.createDirectory(
        atPath: mounted.string, withIntermediateDirectories: false)
      try #require(
        unsafe mount("tmpfs", mounted.string, "tmpfs", 0, "size=16m,huge=always") == 0,
        "mount: \(Errno(rawValue: errno))")
      defer { _ = unsafe umount2(mounted.string, Int32(MNT_DETACH)) }
      let (base, diff) = (directory.appending("base"), mounted.appending("diff"))
      try makeFile(base, length: 4 << 20)
      try makeFile(diff, length: 4 << 20, [Part(offset: 2 << 20, bytes: [1])])
      let error = importError { _ = try MemoryInput.firecracker(memory: base, diffs: [diff]) }
      #expect(error?.code == .holesUnknown)
      #expect(error?.path == diff)
      let huge = FlatLayout.firecracker(pageSize: .size2MiB)
      let input = try MemoryInput.firecracker(memory: base, diffs: [diff], layout: huge)
      #expect(try input.extents(region: 0).map(\.offset) == [2 << 20])
    }
  }
}
