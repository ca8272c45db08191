// SPDX-License-Identifier: Apache-2.0

import LinuxSystem
import MemoryImage
import SystemPackage
import TestSupport
import Testing

@Suite("Compressed images")
struct CompressionTests {
  /// Blocks of words that repeat, different from each other.
  private func text(_ block: Int) -> [UInt8] {
    Array((0..<1400).flatMap { Array("\(block * 7919 + $0) ".utf8) }.prefix(4096))
  }

  private func write(
    _ blocks: [[UInt8]], _ options: ImageOptions, to path: FilePath
  ) throws -> FileStatus {
    let region = ImageRegion(
      name: "ram", guestAddress: GuestAddress(0), length: blocks.count * 4096,
      pageSize: .size4KiB)
    let writer = try ImageWriter(path: path, regions: [region], options: options)
    try writer.write(region: 0, firstBlock: 0, blocks.flatMap { $0 })
    try writer.finish()
    return try OwnedDescriptor(openingForReading: path).status
  }

  @Test("What compresses takes less, what does not takes no more", arguments: [true, false])
  func size(compresses: Bool) throws {
    var random = SeededRandom(seed: 3)
    let blocks = (0..<256).map { block in
      compresses ? text(block) : (0..<512).flatMap { _ in RawImage.littleEndian(random.next()) }
    }
    try withTemporaryDirectory { directory in
      let directory = FilePath(directory)
      let plain = try write(
        blocks, ImageOptions(encoding: .stored), to: directory.appending("plain"))
      let small = try write(blocks, ImageOptions(), to: directory.appending("small"))
      if compresses {
        #expect(small.length < plain.length / 2)
      } else {
        #expect(small.length <= plain.length + 8192)
      }
      let image = try MemoryImage(path: directory.appending("small"))
      #expect(try image.read(region: 0, firstBlock: 0, blockCount: 256).blocks == blocks)
    }
  }

  @Test("Equal blocks are stored once, wherever they are", arguments: Sample.encodings)
  func equalBlocks(options: ImageOptions) throws {
    var random = SeededRandom(seed: 5)
    let contents = (0..<8).map { _ in
      (0..<512).flatMap { _ in RawImage.littleEndian(random.next()) }
    }
    let blocks = (0..<2000).map { _ in contents[Int.random(in: 0..<8, using: &random)] }
    try withTemporaryDirectory { directory in
      let path = FilePath(directory).appending("image")
      let status = try write(blocks, options, to: path)
      #expect(status.allocatedBytes < 40 * 4096, "8 blocks, the index, a table")
      let image = try MemoryImage(path: path)
      var read: [[UInt8]] = []
      while read.count < 2000 {
        read += try image.read(
          region: 0, firstBlock: read.count, blockCount: 2000 - read.count
        ).blocks
      }
      #expect(read == blocks)
      #expect(try image.verify().dataBlocks == 2000)
    }
  }

  @Test("A flip of any byte of the data is damage, never wrong memory")
  func flips() throws {
    var sample = Sample.smallMachine
    for block in sample.data[0].keys { sample.data[0][block] = text(block) }
    let intact = try sample.encoded(ImageOptions())
    let file = try ScratchFile(intact.bytes)
    let start = Int(intact.word(RawImage.Header.data))
    let length = Int(intact.word(RawImage.Header.dataLength))
    var missed: [Int] = []
    for offset in stride(from: start, to: start + length, by: 5) {
      try file.write([intact.bytes[offset] ^ (1 << UInt8(offset % 8))], at: offset)
      let image = try MemoryImage(path: file.path)
      let comparison = sample.compare(with: image)
      // A few bits of a frame mean nothing: then the content is right.
      if comparison.wrong > 0 { missed.append(offset) }
      #expect(comparison.errors.allSatisfy { $0.code == .damaged })
      try file.write([intact.bytes[offset]], at: offset)
    }
    #expect(missed.isEmpty)
  }

  @Test("A frame that claims to be longer than a chunk is damage, in bounded memory")
  func bomb() throws {
    let intact = try Sample.smallMachine.encoded(ImageOptions())
    var image = intact
    let table = Int(image.word(RawImage.Header.chunkTable))
    // A frame of one RLE block whose header says 4 GiB.
    let bomb: [UInt8] =
      [0x28, 0xB5, 0x2F, 0xFD, 0xE0] + RawImage.littleEndian(1 << 32) + [0x03, 0x00, 0x10, 0x41]
    let data = Int(image.word(RawImage.Header.data))
    image.bytes.replaceSubrange(data..<data + bomb.count, with: bomb)
    for chunk in 0..<Int(image.word(RawImage.Header.chunkCount)) {
      image.set(table + chunk * 16, word: UInt64(bomb.count))
    }
    image.set(
      table + 4088, word: RawImage.hash(image.bytes[table..<table + 4088], seed: image.key(7)))
    let file = try ScratchFile(image.bytes)
    let comparison = Sample.smallMachine.compare(with: try MemoryImage(path: file.path))
    #expect(comparison.wrong == 0)
    #expect(comparison.errors.count == Sample.smallMachine.data.reduce(0) { $0 + $1.count })
  }

  @Test("The content id is the same for the same writes, and another for another byte")
  func contentID() throws {
    let sample = Sample.smallMachine
    var other = sample
    other.data[0][2]?[77] ^= 1
    let ids = try [sample, sample, other].map { sample in
      let file = try ScratchFile(try sample.encoded(ImageOptions()).bytes)
      return try MemoryImage(path: file.path).contentID
    }
    #expect(ids[0] == ids[1])
    #expect(ids[0] != ids[2])
    #expect(ids[0].description.count == 64)
  }
}
