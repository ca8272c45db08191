// SPDX-License-Identifier: Apache-2.0

import LinuxSystem
import MemoryImage
import Synchronization
import SystemPackage
import TestSupport
import Testing

@Suite("What was written is read")
struct RoundTripTests {
  @Test(
    "Random memory comes back, block by block and in runs",
    arguments: [
      ([1], PageSize.size4KiB), ([511], .size4KiB), ([512, 1, 1022, 1023], .size4KiB),
      ([1024, 512], .size2MiB),
    ], Sample.encodings)
  func randomMemory(memory: ([Int], PageSize), options: ImageOptions) throws {
    let (blocks, pageSize) = memory
    let sample = Sample(seed: 1, blocks: blocks, pageSize: pageSize)
    try withTemporaryDirectory { directory in
      let path = FilePath(directory).appending("image")
      try sample.write(to: path, options)
      let image = try MemoryImage(path: path)
      #expect(image.regions == sample.regions)
      for limit in [1, 7, 1000] {
        let comparison = sample.compare(with: image, limit: limit)
        #expect(comparison.wrong == 0)
        #expect(comparison.errors.isEmpty)
        #expect(comparison.right == blocks.reduce(0, +))
      }
      let report = try image.verify()
      #expect(report.isIntact)
      #expect(report.dataBlocks == sample.data.reduce(0) { $0 + $1.count })
      #expect(report.dataBlocks + report.zeroBlocks == blocks.reduce(0, +))
    }
  }

  @Test("A run is the longest that is all zero or all data")
  func longestRuns() throws {
    let sample = Sample(seed: 2, blocks: [1500])
    let file = try ScratchFile(try sample.encoded().bytes)
    let image = try MemoryImage(path: file.path)
    var block = 0
    while block < 1500 {
      let isData = sample.data[0][block] != nil
      var end = block
      while end < 1500, (sample.data[0][end] != nil) == isData { end += 1 }
      let (run, _) = try image.read(region: 0, firstBlock: block, blockCount: 1500 - block)
      #expect(run == ImageRun(kind: isData ? .data : .zero, blockCount: end - block))
      block = end
    }
  }

  @Test("Device states and metadata come back, in order and to the byte")
  func statesAndMetadata() throws {
    let sample = Sample.machine
    let file = try ScratchFile(try Sample.machineImage.get().bytes)
    let image = try MemoryImage(path: file.path)
    #expect(image.states == sample.states)
    #expect(image.metadata == sample.metadata)
    #expect(image.id.description.count == 32)
  }

  @Test("The bytes are those that the document gives as its example")
  func exampleOfTheDocument() throws {
    var sample = Sample(seed: 0, blocks: [2048])
    var random = SeededRandom(seed: 3)
    sample.regions[0].name = "ram"
    sample.data[0] = [0: Sample.randomBlock(&random)]
    sample.metadata = ["arch": "x86_64"]
    let written = try sample.encoded()

    var expected = RawImage(bytes: [UInt8](repeating: 0, count: 28_690))
    expected.bytes.replaceSubrange(0..<8, with: [0x89, 0x46, 0x4C, 0x49, 0x4D, 0x47, 0x0D, 0x0A])
    expected.set(RawImage.Header.version, half: 2)
    expected.set(RawImage.Header.headerLength, half: 4096)
    expected.set(RawImage.Header.fileLength, word: 28_690)
    expected.bytes.replaceSubrange(24..<40, with: written.bytes[24..<40])
    expected.set(RawImage.Header.regionCount, half: 1)
    expected.set(RawImage.Header.metadataCount, half: 1)
    expected.set(RawImage.Header.blockSize, half: 4096)
    expected.set(RawImage.Header.blocksPerChunk, half: 1)
    let tables = [(RawImage.Header.regionTable, 4096, 128)]
    let others = [
      (RawImage.Header.stateTable, 28_672, 0), (RawImage.Header.ancestors, 28_672, 0),
      (RawImage.Header.metadata, 28_672, 18),
    ]
    for (table, offset, length) in tables + others {
      expected.set(table, word: UInt64(offset))
      expected.set(table + 8, word: UInt64(length))
    }
    expected.set(RawImage.Header.data, word: 8192)
    expected.set(RawImage.Header.dataLength, word: 4096)
    expected.set(RawImage.Header.chunkTable, word: 24_576)
    expected.set(RawImage.Header.chunkCount, word: 1)
    expected.set(expected.region(0, RawImage.Region.length), word: 8_388_608)
    expected.set(expected.region(0, RawImage.Region.pageSize), word: 4096)
    expected.set(expected.region(0, RawImage.Region.indexOffset), word: 12_288)
    expected.set(expected.region(0, RawImage.Region.nameLength), half: 3)
    expected.bytes.replaceSubrange(4144..<4147, with: Array("ram".utf8))
    expected.bytes.replaceSubrange(8192..<12_288, with: sample.block(0, 0))
    expected.set(12_288, half: 1)
    expected.set(24_576, word: RawImage.hash(sample.block(0, 0), seed: expected.key(6)))
    for (start, tag, page) in [(12_288, 5, 0), (16_384, 5, 1), (20_480, 5, 2), (24_576, 7, 0)] {
      let seed = expected.key(UInt64(tag)) &+ RawImage.step &* UInt64(page)
      expected.set(
        start + 4088, word: RawImage.hash(expected.bytes[start..<start + 4088], seed: seed))
    }
    let metadata: [UInt8] = [4, 0, 0, 0, 6, 0, 0, 0] + Array("archx86_64".utf8)
    expected.bytes.replaceSubrange(28_672..<28_690, with: metadata)
    let parts = [
      Array(expected.bytes[40..<56] + expected.bytes[128..<144]),
      Array(expected.bytes[4096..<4224]), [], RawImage.sha256(sample.block(0, 0)),
      Array(
        expected.bytes[12_288..<16_376] + expected.bytes[16_384..<20_472]
          + expected.bytes[20_480..<24_568]), metadata,
    ]
    let content = parts.flatMap { RawImage.littleEndian(UInt64($0.count)) + $0 }
    expected.bytes.replaceSubrange(200..<232, with: RawImage.sha256(content))
    expected.reseal()
    #expect(isSame(written.bytes, expected.bytes))
  }

  @Test("A region of 64 GiB with three blocks of data opens at once and takes little disk")
  func sparse() throws {
    let last = (64 << 18) - 1
    var random = SeededRandom(seed: 4)
    let blocks = Dictionary(
      uniqueKeysWithValues: [0, 5_000_000, last].map { ($0, Sample.randomBlock(&random)) })
    let region = ImageRegion(
      name: "ram", guestAddress: GuestAddress(0), length: 64 << 30, pageSize: .size1GiB)
    try withTemporaryDirectory { directory in
      let path = FilePath(directory).appending("image")
      let writer = try ImageWriter(path: path, regions: [region])
      try writer.write(region: 0, blocks: blocks)
      try writer.finish()
      let status = try OwnedDescriptor(openingForReading: path).status
      #expect(status.length < 65 << 20)
      #expect(status.allocatedBytes < region.length / 400, "the index, and three blocks")

      let opened = try ContinuousClock().measure { _ = try MemoryImage(path: path) }
      #expect(opened < .milliseconds(50))
      let image = try MemoryImage(path: path)
      for (block, bytes) in blocks {
        #expect(try image.read(region: 0, firstBlock: block, blockCount: 1).blocks == [bytes])
      }
      let zeros = try image.read(region: 0, firstBlock: 1, blockCount: 600).run
      #expect(zeros == ImageRun(kind: .zero, blockCount: 600))
    }
  }

  @Test("A later write of a block replaces an earlier one")
  func rewrite() throws {
    var sample = Sample(seed: 5, blocks: [4])
    var random = SeededRandom(seed: 5)
    sample.data[0] = [1: Sample.randomBlock(&random), 2: Sample.randomBlock(&random)]
    try withTemporaryDirectory { directory in
      let path = FilePath(directory).appending("image")
      let writer = try ImageWriter(path: path, regions: sample.regions)
      try writer.write(
        region: 0, firstBlock: 0, Sample.zeroBlock + Sample.randomBlock(&random) + Sample.zeroBlock)
      try writer.write(region: 0, firstBlock: 3, Sample.randomBlock(&random))
      try writer.write(region: 0, blocks: sample.data[0])
      try writer.write(region: 0, firstBlock: 3, Sample.zeroBlock)
      try writer.finish()
      let comparison = sample.compare(with: try MemoryImage(path: path))
      #expect(comparison.right == 4)
    }
  }

  @Test("Eight threads that read the same blocks at once all get the right ones")
  func concurrentReaders() throws {
    let sample = Sample.machine
    let file = try ScratchFile(try Sample.machineImage.get().bytes)
    let counts = Mutex((right: 0, wrong: 0, errors: 0))
    for _ in 0..<3 {
      // A new one each time: loading the index is where threads meet.
      let image = try MemoryImage(path: file.path)
      try inThreads(8) { number in
        let comparison = sample.compare(with: image, limit: 1 + number * 9)
        counts.withLock {
          $0.right += comparison.right
          $0.wrong += comparison.wrong
          $0.errors += comparison.errors.count
        }
      }
    }
    let (right, wrong, errors) = counts.withLock { $0 }
    #expect((right, wrong, errors) == (3 * 8 * 2068, 0, 0))
  }

  @Test("Threads that write different blocks at once make one image")
  func concurrentWriters() throws {
    let sample = Sample(seed: 6, blocks: [2048])
    let errors = Atomic(0)
    try withTemporaryDirectory { directory in
      let path = FilePath(directory).appending("image")
      let writer = try ImageWriter(path: path, regions: sample.regions)
      let blocks = writer.blocks
      try inThreads(4) { number in
        let bytes = (0..<512).flatMap { sample.block(0, number * 512 + $0) }
        do {
          try unsafe bytes.withUnsafeBytes {
            try unsafe blocks.write(region: 0, firstBlock: number * 512, bytes: $0)
          }
        } catch {
          errors.add(1, ordering: .relaxed)
        }
      }
      try writer.finish()
      let comparison = sample.compare(with: try MemoryImage(path: path))
      #expect(comparison.right == 2048)
    }
    #expect(errors.load(ordering: .relaxed) == 0)
  }

  @Test(
    "Blocks that a region does not have are refused",
    arguments: [
      (-1, 0, 1), (2, 0, 1), (0, -1, 1), (0, 2060, 1), (0, 2059, 2), (0, 0, 2061),
      (0, .max, .max), (0, .min, 1),
    ])
  func outOfRange(region: Int, firstBlock: Int, blockCount: Int) throws {
    let file = try ScratchFile(try Sample.machineImage.get().bytes)
    let image = try MemoryImage(path: file.path)
    var room = [UInt8](repeating: 0, count: 4096)
    let reading = imageError {
      try unsafe room.withUnsafeMutableBytes { buffer in
        _ = try unsafe image.read(
          region: region, firstBlock: firstBlock, blockCount: blockCount,
          into: buffer.baseAddress.unsafelyUnwrapped)
      }
    }
    #expect(reading?.code == .outOfRange)
    guard blockCount <= 1031 else { return }
    try withTemporaryDirectory { directory in
      let writer = try ImageWriter(
        path: FilePath(directory).appending("image"), regions: Sample.machine.regions)
      let writing = imageError {
        try writer.write(
          region: region, firstBlock: firstBlock,
          [UInt8](repeating: 1, count: blockCount * 4096))
      }
      #expect(writing?.code == .outOfRange)
    }
  }

  @Test("No blocks, and half a block, are refused")
  func oddCounts() throws {
    let file = try ScratchFile(try Sample.machineImage.get().bytes)
    let image = try MemoryImage(path: file.path)
    let none = imageError { _ = try image.read(region: 0, firstBlock: 0, blockCount: 0) }
    #expect(none?.code == .outOfRange)
    try withTemporaryDirectory { directory in
      let writer = try ImageWriter(
        path: FilePath(directory).appending("image"), regions: Sample.machine.regions)
      let half = imageError {
        try writer.write(region: 0, firstBlock: 0, [UInt8](repeating: 1, count: 2048))
      }
      #expect(half?.code == .outOfRange)
      try writer.finish()
    }
  }
}
