// SPDX-License-Identifier: Apache-2.0

import Foundation
import GuestMemory
import LinuxSystem
import SystemPackage
import TestSupport
import Testing
import Userfault

@testable import Pager

@Suite("A raw memory file as a source")
struct FileSourceTests {
  /// Blocks of data at 0, 5, 6 and the last one, and holes.
  private func makeFile(_ path: String, blocks: Int) throws {
    let data = [0, 5, 6, blocks - 1]
    _ = FileManager.default.createFile(atPath: path, contents: nil)
    let file = try FileHandle(forWritingTo: URL(fileURLWithPath: path))
    try file.truncate(atOffset: UInt64(blocks * 4096))
    for block in data {
      try file.seek(toOffset: UInt64(block * 4096))
      try file.write(contentsOf: Data(repeating: UInt8(block % 251 + 1), count: 4096))
    }
    try file.close()
  }

  @Test("Every page is that of the file, and holes are zero", arguments: [false, true])
  func content(inMemory: Bool) throws {
    try withTemporaryDirectory { directory in
      let path = (inMemory ? "/dev/shm" : directory) + "/faultline-raw-\(UUID().uuidString)"
      defer { unsafe unlink(path) }
      try makeFile(path, blocks: 64)
      let source = try FileSource(
        OwnedDescriptor(openingForReading: FilePath(path)), regions: [16 * 4096, 48 * 4096])
      let memories = try [16, 48].map { try GuestMemoryHolder(pages: $0) }
      let session = try PagerSession(
        userfaultfd: try Userfaultfd(wanting: PagerSession<FileSource>.features.wanted),
        regions: try memories.enumerated().map { number, holder in
          try PagedRegion(holder.memory, mode: .missing, sourceRegion: number)
        }, source: source)
      try session.start()
      for block in 0..<64 {
        let (holder, place) = block < 16 ? (memories[0], block) : (memories[1], block - 16)
        let value = load(holder.memory.range, offset: place * 4096) & 0xFF
        let expected: UInt64 = [0, 5, 6, 63].contains(block) ? UInt64(block % 251 + 1) : 0
        #expect(value == expected, "block \(block)")
      }
      #expect(session.failures.isEmpty)
      session.release()
    }
  }

  @Test("A file that is too short, or is cut, is never filled up with zeros")
  func short() throws {
    try withTemporaryDirectory { directory in
      let path = directory + "/raw"
      try makeFile(path, blocks: 16)
      #expect(throws: PageSourceError.self) {
        _ = try FileSource(
          OwnedDescriptor(openingForReading: FilePath(path)), regions: [17 * 4096])
      }
      let source = try FileSource(
        OwnedDescriptor(openingForReading: FilePath(path)), regions: [16 * 4096])
      let file = try FileHandle(forWritingTo: URL(fileURLWithPath: path))
      try file.truncate(atOffset: 5 * 4096 + 100)
      try file.close()
      let holder = try GuestMemoryHolder(pages: 16)
      let session = try PagerSession(
        userfaultfd: try Userfaultfd(wanting: PagerSession<FileSource>.features.wanted),
        regions: [try PagedRegion(holder.memory, mode: .missing)], source: source)
      try session.start()
      try #require(session.canPoison, "this kernel has no UFFDIO_POISON")
      #expect(load(holder.memory.range, offset: 0) != 0)
      for block in [5, 6, 15] {
        #expect(guardedLoad(holder.memory.range, offset: block * 4096) == .busError)
      }
      session.release()
    }
  }
}

/// Memory that an array can hold.
private final class GuestMemoryHolder: Sendable {
  let memory: GuestMemoryObject
  init(pages: Int) throws {
    memory = try GuestMemoryObject(backing: .anonymous, length: pages * 4096)
  }
}
