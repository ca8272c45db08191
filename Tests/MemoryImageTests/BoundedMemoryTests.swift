// SPDX-License-Identifier: Apache-2.0

import CXXHash
import LinuxSystem
import MemoryImage
import Synchronization
import SystemPackage
import TestSupport
import Testing

/// Anonymous memory of this process in bytes (proc_pid_status(5)).
private func residentBytes() throws -> Int {
  let file = try FileDescriptor.open(FilePath("/proc/self/status"), .readOnly)
  var bytes = [UInt8](repeating: 0, count: 1 << 14)
  let count = try file.closeAfter {
    try unsafe bytes.withUnsafeMutableBytes { try unsafe file.read(into: $0) }
  }
  let text = String(decoding: bytes[..<count], as: UTF8.self)
  let line = try #require(text.split(separator: "\n").first { $0.hasPrefix("RssAnon:") })
  return try #require(Int(line.split(separator: " ").dropFirst().first.map(String.init) ?? ""))
    << 10
}

/// The most memory that this process had at any time (VmHWM, proc_pid_status(5)).
private func peakBytes() throws -> Int {
  let text = try Host.processFile("status")
  let line = try #require(text.split(separator: "\n").first { $0.hasPrefix("VmHWM:") })
  return try #require(Int(line.split(separator: " ").dropFirst().first.map(String.init) ?? ""))
    << 10
}

@Suite("The index takes a bounded part of memory, whatever is read")
struct BoundedMemoryTests {
  @Test("Verifying a file that claims 2^32 chunks takes a bounded part of memory")
  func claimedChunks() async {
    await #expect(processExitsWith: .success) {
      try withTemporaryDirectory { directory in
        typealias Header = RawImage.Header
        let path = FilePath(directory).appending("image")
        try Sample.smallMachine.write(
          to: path, ImageOptions(encoding: .zstd(level: 1), blocksPerChunk: 1))
        var image = RawImage(bytes: try contents(of: path))
        // The chunk table is in a hole behind the file, but for its first page.
        let chunks = Int(UInt32.max) - 2
        let old = Int(image.word(Header.chunkTable))
        let table = (image.bytes.count + 4095) & ~4095
        let length = table + (chunks + 254) / 255 * 4096
        let page = Array(image.bytes[old..<old + 4096])
        image.set(Header.chunkTable, word: UInt64(table))
        image.set(Header.chunkCount, word: UInt64(chunks))
        image.set(Header.fileLength, word: UInt64(length))
        image.resealHeader()
        let file = try OwnedDescriptor(openingForUpdate: path)
        try file.setLength(length)
        try file.writeAll(Array(image.bytes.prefix(4096)), at: 0)
        try file.writeAll(page, at: table)
        let before = try peakBytes()
        let report = try MemoryImage(path: path).verify()
        precondition(report.isIntact && report.dataBlocks > 0)
        let growth = try peakBytes() - before
        precondition(growth < 256 << 20, "\(growth) bytes")
      }
    }
  }

  @Test("Chunks that are forgotten are looked at again", arguments: Sample.encodings)
  func forgottenChunks(options: ImageOptions) throws {
    try withTemporaryDirectory { directory in
      let path = FilePath(directory).appending("image")
      try Sample(seed: 11, blocks: [9000, 100]).write(to: path, options)
      let image = try MemoryImage(path: path)
      // More chunks than there is room for; blocks that are equal come again.
      let usual = try image.verify()
      let forgetful = try image.verify(rememberedChunks: 1)
      #expect(forgetful.isIntact && usual.isIntact)
      #expect(forgetful.dataBlocks == usual.dataBlocks && usual.dataBlocks > 3000)
      #expect(forgetful.zeroBlocks == usual.zeroBlocks)
      let sample = try image.verify(sample: 0.1, seed: 5)
      let forgetfulSample = try image.verify(sample: 0.1, seed: 5, rememberedChunks: 1)
      #expect(sample.unreadBlocks == forgetfulSample.unreadBlocks && sample.unreadBlocks > 0)
    }
  }

  private static let pages = 40

  /// An image of which each index page has data in other places. A block of data begins with
  /// its number.
  private func write(_ options: ImageOptions, to path: FilePath, parent: MemoryImage?) throws {
    let region = ImageRegion(
      name: "ram", guestAddress: GuestAddress(0), length: Self.pages * 1022 * 4096,
      pageSize: .size4KiB)
    let writer = try ImageWriter(path: path, regions: [region], options: options, parent: parent)
    for block in 0..<region.blockCount
    where hasData(block) && (parent == nil) == (block % 2 == 0) {
      try writer.write(region: 0, firstBlock: block, content(block))
    }
    try writer.finish()
  }

  private func hasData(_ block: Int) -> Bool {
    var random = SeededRandom(seed: UInt64(block))
    return random.next() % 24 == 0
  }

  private func content(_ block: Int) -> [UInt8] {
    RawImage.littleEndian(UInt64(block)) + Sample.zeroBlock.dropFirst(8).dropLast() + [1]
  }

  @Test(
    "Threads that push out each other's pages never read a wrong block",
    arguments: [
      ImageOptions(encoding: .stored), ImageOptions(encoding: .zstd(level: 1), blocksPerChunk: 4),
    ])
  func concurrent(options: ImageOptions) throws {
    try withTemporaryDirectory { directory in
      let parent = FilePath(directory).appending("parent")
      let path = FilePath(directory).appending("child")
      try write(options, to: parent, parent: nil)
      try write(options, to: path, parent: try MemoryImage(path: parent))
      // Four slots for 40 pages of the index and those of two chunk tables.
      let image = try MemoryImage(path: path, cachedPages: 1)
      let expected = (0..<Self.pages * 1022).map(hasData)
      let wrong = Atomic(0)
      try PieceWork(pieces: 4, threads: 4).run(name: "read") { (piece) throws(ImageError) in
        var random = SeededRandom(seed: UInt64(piece))
        let start = UnsafeMutableRawPointer.allocate(byteCount: 64 * 4096, alignment: 8)
        defer { unsafe start.deallocate() }
        for _ in 0..<6000 {
          let block = Int.random(in: 0..<expected.count, using: &random)
          let limit = min(Int.random(in: 1...64, using: &random), expected.count - block)
          let run = try unsafe image.read(
            region: 0, firstBlock: block, blockCount: limit, into: start)
          for index in 0..<run.blockCount {
            let number = unsafe start.load(fromByteOffset: index * 4096, as: Int.self)
            let isRight =
              run.kind == .data
              ? expected[block + index] && number == block + index : !expected[block + index]
            if !isRight { wrong.add(1, ordering: .relaxed) }
          }
          // A run goes as far as it can.
          if run.blockCount < limit, expected[block + run.blockCount] == (run.kind == .data) {
            wrong.add(1, ordering: .relaxed)
          }
        }
      }
      #expect(wrong.load(ordering: .relaxed) == 0)
    }
  }

  @Test("All blocks of an image and of a chain take 1 MiB for each GiB", arguments: [1, 4])
  func resident(images: Int) async {
    await #expect(processExitsWith: .success) { [images = images as Int] in
      try withTemporaryDirectory { directory in
        let blocks = 1 << 17
        for number in 0..<images {
          try SparseImage(blocks: blocks, images: images, number: number).write(
            in: FilePath(directory))
        }
        let path = FilePath(directory).appending("image\(images - 1)")
        let room = UnsafeMutableRawPointer.allocate(byteCount: 64 * 4096, alignment: 4096)
        defer { unsafe room.deallocate() }
        func touchAll(_ image: MemoryImage) throws {
          var block = 0
          while block < blocks {
            let run = try unsafe image.read(
              region: 0, firstBlock: block, blockCount: min(64, blocks - block), into: room)
            #expect(run.kind == .data)
            block += run.blockCount
          }
        }
        // What is made once by the first use of anything.
        try touchAll(try MemoryImage(path: path, cachedPages: 1))
        let before = try residentBytes()
        let image = try MemoryImage(path: path)
        try touchAll(image)
        let used = try residentBytes() - before
        withExtendedLifetime(image) {}
        let limit = image.guestBytes >> 10
        #expect(used <= limit, "\(used) bytes for \(image.guestBytes) bytes of memory")
        #expect(used > limit / 4, "the test sees what it measures")
      }
    }
  }
}
