// SPDX-License-Identifier: Apache-2.0

import Glibc
import LinuxSystem
import MemoryImage
import SystemPackage
import TestSupport
import Testing

@Suite("Images are copied and read as bytes")
struct CopyTests {
  @Test("A merge is an image of its own with the same memory, states and metadata")
  func merge() throws {
    try withTemporaryDirectory { directory in
      let directory = FilePath(directory)
      let (base, top) = (directory.appending("base"), directory.appending("top"))
      let whole = directory.appending("whole")
      var sample = Sample(seed: 3, blocks: [1100, 40])
      try sample.write(to: base)
      var random = SeededRandom(seed: 4)
      let changes = [2: Sample.randomBlock(&random), 1030: Sample.zeroBlock]
      var writer = try ImageWriter(
        path: top, regions: sample.regions, parent: try MemoryImage(path: base))
      try writer.write(region: 0, blocks: changes)
      try writer.setMetadata(key: "k", value: "v")
      try writer.add(state: DeviceState(type: 1, instance: 2, bytes: [3]))
      try writer.finish()
      sample.data[0].merge(changes) { $1 }
      try MemoryImage(path: top).merge(to: whole, threads: 3)
      try #require(unsafe unlink(base.string) == 0)
      let merged = try MemoryImage(path: whole)
      #expect(merged.ancestors.isEmpty)
      #expect(merged.metadata == ["k": "v"] && merged.states.map(\.bytes) == [[3]])
      #expect(sample.compare(with: merged).right == 1140)
      let usage = try merged.usage(ofRegion: 0)
      #expect(usage.inheritedBlocks == 0)
      #expect(usage.zeroBlocks + usage.ownBlocks == 1100)
    }
  }

  @Test("Damage stops a merge, and leaves nothing behind")
  func damage() throws {
    try withTemporaryDirectory { directory in
      let raw = try Sample.machineImage.get()
      let file = try ScratchFile(raw.bytes)
      try file.write(
        [raw.bytes[raw.dataOffset(region: 0, block: 3)] ^ 1],
        at: raw.dataOffset(region: 0, block: 3))
      let target = FilePath(directory).appending("merged")
      let error = imageError { try MemoryImage(path: file.path).merge(to: target) }
      #expect(error?.code == .damaged)
      #expect(error?.block == 3)
      #expect(unsafe access(target.string, F_OK) != 0)
    }
  }

  @Test("Read as bytes, zeros and data come alike, and the index finds the data")
  func bytes() throws {
    let sample = Sample.machine
    let file = try ScratchFile(try Sample.machineImage.get().bytes)
    let image = try MemoryImage(path: file.path)
    var random = SeededRandom(seed: 2)
    for _ in 0..<100 {
      let region = Int.random(in: 0...1, using: &random)
      let count = sample.regions[region].blockCount
      let first = Int.random(in: 0..<count, using: &random)
      let blocks = first..<Int.random(in: first...min(first + 40, count), using: &random)
      var buffer = [UInt8](repeating: 0xee, count: blocks.count * 4096)
      let hasData = try unsafe buffer.withUnsafeMutableBytes {
        try unsafe image.read(region: region, offset: first * 4096, into: $0)
      }
      #expect(isSame(buffer, blocks.flatMap { sample.block(region, $0) }))
      let data = blocks.first { sample.data[region][$0] != nil }
      #expect(hasData == (data != nil))
      let range = blocks.lowerBound * 4096..<blocks.upperBound * 4096
      #expect(try image.nextData(region: region, in: range) == data.map { $0 * 4096 })
    }
    var room = [UInt8](repeating: 0, count: 8192)
    for (region, offset) in [(0, 1), (0, 2060 * 4096 - 4096), (2, 0), (0, -4096)] {
      let error = unsafe room.withUnsafeMutableBytes { buffer in
        imageError { _ = try unsafe image.read(region: region, offset: offset, into: buffer) }
      }
      #expect(error?.code == .outOfRange)
      #expect(
        imageError { _ = try image.nextData(region: region, in: offset..<offset + 8192) }?.code
          == .outOfRange)
    }
  }

  @Test("Pieces cover all regions, each block once")
  func pieces() {
    let regions = [1, 1024, 1025, 5000].map {
      ImageRegion(
        name: "r", guestAddress: GuestAddress(0), length: $0 * 4096, pageSize: .size4KiB)
    }
    let pieces = RegionPieces(regions)
    var ends = [0, 0, 0, 0]
    for number in 0..<pieces.count {
      let piece = pieces[number]
      #expect(piece.blocks.lowerBound == ends[piece.region] && !piece.blocks.isEmpty)
      #expect(piece.bytes.count <= PieceWork.pieceLength)
      #expect(piece.bytes.lowerBound == piece.blocks.lowerBound * 4096)
      ends[piece.region] = piece.blocks.upperBound
    }
    #expect(ends == [1, 1024, 1025, 5000])
    #expect(RegionPieces([]).count == 0)
  }
}
