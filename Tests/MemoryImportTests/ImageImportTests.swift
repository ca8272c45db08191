// SPDX-License-Identifier: Apache-2.0

import Foundation
import LinuxSystem
import MemoryImage
import MemoryImport
import Synchronization
import SystemPackage
import TestSupport
import Testing

@Suite("Memory becomes an image, and the image becomes the memory again")
struct ImageImportTests {
  private static let pages = 9 * 256

  private func makeRaw(_ path: FilePath, seed: UInt64) throws {
    var random = Random(seed: seed)
    try makeFile(
      path, length: Self.pages * 4096,
      randomParts(pages: Self.pages - 8, &random).filter { _ in
        Int.random(in: 0..<8, using: &random) == 0
      })
  }

  @Test(
    "An export of an import is the file, byte for byte, and as sparse",
    arguments: [ImageEncoding.stored, .zstd(level: 1)], [1, 3])
  func roundTrip(encoding: ImageEncoding, threads: Int) throws {
    try withDirectory { directory in
      let (raw, image) = (directory.appending("raw"), directory.appending("image"))
      let back = directory.appending("back")
      try makeRaw(raw, seed: 21)
      let greatest = Mutex(0)
      try ImageImport.write(
        MemoryInput.raw(raw), to: image, options: ImageOptions(encoding: encoding),
        metadata: ["k": "v"], threads: threads
      ) { done, total in
        #expect(total == Self.pages * 4096)
        greatest.withLock { $0 = max($0, done) }
      }
      #expect(greatest.withLock { $0 } == Self.pages * 4096)
      let opened = try MemoryImage(path: image)
      #expect(opened.metadata == ["k": "v"])
      #expect(try opened.verify().isIntact)
      try RawExport.write(opened, to: back, threads: threads)
      #expect(try contents(of: back) == contents(of: raw))
      #expect(try allocatedBytes(of: back) <= allocatedBytes(of: raw) + 65536)
    }
  }

  @Test("On a parent, what became zero is zero, and only changes are stored")
  func parent() throws {
    try withDirectory { directory in
      let files = ["first", "second"].map { directory.appending($0) }
      for (number, file) in files.enumerated() { try makeRaw(file, seed: UInt64(number)) }
      let (base, top) = (directory.appending("base"), directory.appending("top"))
      try ImageImport.write(MemoryInput.raw(files[0]), to: base)
      let parent = try MemoryImage(path: base)
      for (number, file) in files.enumerated() {
        try ImageImport.write(MemoryInput.raw(file), to: top, parent: parent)
        let image = try MemoryImage(path: top)
        let back = directory.appending("back")
        try RawExport.write(image, to: back)
        #expect(try contents(of: back) == contents(of: file))
        #expect(try (image.usage(ofRegion: 0).ownBlocks == 0) == (number == 0))
      }
    }
  }

  @Test("A guest with memory past 4 GiB keeps its addresses through import and export")
  func gap() throws {
    try withDirectory { directory in
      let (memory, image) = (directory.appending("memory"), directory.appending("image"))
      var random = Random(seed: 5)
      let gib = 1 << 30
      let parts = [0, 3 * gib - 4096, 3 * gib, 4 * gib - 4096].map {
        Part(offset: $0, bytes: random.bytes(4096))
      }
      try makeFile(memory, length: 4 * gib, parts)
      try ImageImport.write(MemoryInput.firecracker(memory: memory), to: image)
      let opened = try MemoryImage(path: image)
      #expect(opened.regions.map(\.guestAddress) == [GuestAddress(0), GuestAddress(4 << 30)])
      #expect(opened.regions.map(\.length) == [3 * gib, gib])
      let back = directory.appending("back")
      try RawExport.write(opened, to: back)
      let input = try MemoryInput.raw(back)
      #expect(try input.extents(region: 0).reduce(0) { $0 + $1.length } <= 8 * 4096)
      for part in parts {
        #expect(try input.bytes(region: 0, offset: part.offset, count: 4096).bytes == part.bytes)
      }
    }
  }

  @Test("A core's segments are the image's regions, at any place of its file")
  func core() throws {
    try withDirectory { directory in
      var random = Random(seed: 6)
      var builder = CoreBuilder()
      let bytes = [3, 1025].map { random.bytes($0 * 4096) }
      builder.segments = [
        CoreBuilder.Segment(address: 0x10_0000, bytes: bytes[1]),
        CoreBuilder.Segment(address: 0, bytes: bytes[0]),
      ]
      let (path, image) = (directory.appending("core"), directory.appending("image"))
      try makeFile(path, builder.encoded())
      try ImageImport.write(CoreFile(path).input, to: image)
      let opened = try MemoryImage(path: image)
      #expect(opened.regions.map(\.name) == ["ram@0x0", "ram@0x100000"])
      try RawExport.write(opened, to: path)
      #expect(try contents(of: path) == bytes[0] + bytes[1])
    }
  }

  @Test("An input that is cut while it is read is an error that names it; nothing is left")
  func cutInput() throws {
    try withDirectory { directory in
      let raw = directory.appending("raw")
      try makeRaw(raw, seed: 1)
      let input = try MemoryInput.raw(raw)
      try #require(unsafe truncate(raw.string, 4096) == 0)
      let error = importError { try ImageImport.write(input, to: directory.appending("image")) }
      #expect(error?.code == .changed && error?.path == raw)
      #expect(try names(in: directory.string) == ["raw"])
    }
  }

  @Test("What the image refuses is said once, in its words; nothing is left")
  func refusedImage() throws {
    try withDirectory { directory in
      let (raw, base) = (directory.appending("raw"), directory.appending("base"))
      try makeRaw(raw, seed: 1)
      try ImageImport.write(MemoryInput.raw(raw), to: base)
      let input = try MemoryInput.raw(
        raw, layout: .contiguous(at: GuestAddress(4096), pageSize: .size4KiB))
      let target = directory.appending("image")
      let error = importError {
        try ImageImport.write(input, to: target, parent: try MemoryImage(path: base))
      }
      #expect(error?.code == .image)
      #expect((error?.cause as? ImageError)?.code == .invalidArgument)
      #expect(error?.description.contains("its regions are not those of \(base)") == true)
      let lost = importError {
        try ImageImport.write(input, to: directory.appending("no").appending("image"))
      }
      #expect((lost?.cause as? ImageError)?.errno == .noSuchFileOrDirectory)
      #expect(try names(in: directory.string) == ["base", "raw"])
    }
  }

  @Test("Damage in an image stops its export, and leaves nothing")
  func damage() throws {
    try withDirectory { directory in
      let (raw, image) = (directory.appending("raw"), directory.appending("image"))
      var random = Random(seed: 1)
      try makeFile(raw, random.bytes(16 * 4096))
      try ImageImport.write(
        MemoryInput.raw(raw), to: image, options: ImageOptions(encoding: .stored))
      // The data of a stored image begins behind header and region table, at 8192.
      let handle = try #require(FileHandle(forUpdatingAtPath: image.string))
      try handle.seek(toOffset: 8192 + 3 * 4096)
      try handle.write(contentsOf: Data([0]))
      try handle.close()
      let back = directory.appending("back")
      let error = importError { try RawExport.write(MemoryImage(path: image), to: back) }
      #expect(error?.code == .source)
      #expect((error?.cause as? ImageError)?.code == .damaged)
      #expect(error?.description.contains("does not match its checksum") == true)
      #expect(try names(in: directory.string) == ["image", "raw"])
    }
  }
}
