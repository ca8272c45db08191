// SPDX-License-Identifier: Apache-2.0

import LinuxSystem
import MemoryImage
import SystemPackage
import Testing

@Suite("Damage is an error that names the place, never wrong memory")
struct DamageTests {
  private let sample = Sample.machine
  private let intact: RawImage
  private let file: ScratchFile

  init() throws {
    intact = try Sample.machineImage.get()
    file = try ScratchFile(intact.bytes)
  }

  @Test(
    "A cut file is refused at opening",
    arguments: [0, 1, 7, 8, 16, 4095, 4096, 4097, 4351, 8191, 8192, 12_288, 20_480, 100_000, -1])
  func truncated(length: Int) throws {
    try file.setLength(length < 0 ? intact.bytes.count + length : length)
    let error = imageError { _ = try MemoryImage(path: file.path) }
    #expect(error?.code == (length == 0 ? .notAnImage : .truncated))
  }

  @Test("What follows the image is no working set, and the image is read as before")
  func appended() throws {
    try file.setLength(intact.bytes.count + 1)
    let image = try MemoryImage(path: file.path)
    #expect(imageError { _ = try image.workingSet() }?.code == .damaged)
    #expect(try image.verify().damagedBlocks == 0)
  }

  @Test("Something else is not an image", arguments: ["", "#!/bin/sh\n", "FLIMG"])
  func somethingElse(text: String) throws {
    let padded = Array(text.utf8) + [UInt8](repeating: 32, count: 5000)
    let other = try ScratchFile(text.isEmpty ? [] : padded)
    #expect(imageError { _ = try MemoryImage(path: other.path) }?.code == .notAnImage)
  }

  @Test("What is not a regular file is not an image", arguments: ["/", "/dev/null", "/dev/zero"])
  func notRegular(path: String) {
    #expect(imageError { _ = try MemoryImage(path: FilePath(path)) }?.code == .notAnImage)
  }

  @Test("A file that is not there is named with the kernel's reason")
  func missing() {
    let error = imageError { _ = try MemoryImage(path: "/nonexistent/image") }
    #expect(error?.code == .inputOutput)
    #expect(error?.errno == .noSuchFileOrDirectory)
    #expect(error?.description.contains("/nonexistent/image") == true)
  }

  @Test("Another version is refused by its number", arguments: [0, 1, 3, 0xFFFF_FFFF] as [UInt32])
  func version(number: UInt32) throws {
    var image = intact
    image.set(RawImage.Header.version, half: number)
    image.resealHeader()
    let other = try ScratchFile(image.bytes)
    let error = imageError { _ = try MemoryImage(path: other.path) }
    #expect(error?.code == .unsupportedVersion)
    #expect(error?.description.contains("version \(number)") == true)
  }

  @Test("A flip of any byte of header, tables and device states is found at opening")
  func flipsInTables() throws {
    let tables = [
      RawImage.Header.regionTable, RawImage.Header.stateTable, RawImage.Header.metadata,
      RawImage.Header.ancestors,
    ]
    .compactMap { intact.extent(ofTable: $0) }
    let states = (0..<3).map { number in
      let start = Int(intact.word(intact.state(number, RawImage.State.offset)))
      return start..<start + Int(intact.word(intact.state(number, RawImage.State.length)))
    }
    var missed: [Int] = []
    for range in [0..<4096] + tables + states {
      for offset in range {
        let flipped = intact.bytes[offset] ^ (1 << UInt8(offset % 8))
        try file.write([flipped], at: offset)
        if (try? MemoryImage(path: file.path)) != nil { missed.append(offset) }
        try file.write([intact.bytes[offset]], at: offset)
      }
    }
    #expect(missed.isEmpty)
    _ = try MemoryImage(path: file.path)
  }

  @Test("A flip in the index is found when one of its blocks is read")
  func flipsInIndex() throws {
    var missed: [Int] = []
    for offset in stride(from: 0, to: 4096, by: 53) {
      let place = intact.indexOffset(region: 0, page: 1) + offset
      try file.write([intact.bytes[place] ^ 0x10], at: place)
      let image = try MemoryImage(path: file.path)
      let error = imageError { _ = try image.read(region: 0, firstBlock: 1100, blockCount: 1) }
      if error?.code != .damaged || error?.region != 0 || error?.block != 1100
        || error?.fileOffset != intact.indexOffset(region: 0, page: 1)
      {
        missed.append(offset)
      }
      try file.write([intact.bytes[place]], at: place)
    }
    #expect(missed.isEmpty)
  }

  @Test("A flip of any byte of a block is found when it is read")
  func flipsInData() throws {
    let image = try MemoryImage(path: file.path)
    let start = intact.dataOffset(region: 0, block: 3)
    var missed: [Int] = []
    for offset in stride(from: 0, to: 4096, by: 3) {
      try file.write([intact.bytes[start + offset] ^ 1], at: start + offset)
      let error = imageError { _ = try image.read(region: 0, firstBlock: 3, blockCount: 1) }
      if error?.code != .damaged || error?.block != 3 || error?.fileOffset != start {
        missed.append(offset)
      }
      try file.write([intact.bytes[start + offset]], at: start + offset)
    }
    #expect(missed.isEmpty)
    #expect(try image.read(region: 0, firstBlock: 3, blockCount: 1).blocks == [sample.block(0, 3)])
  }

  @Test("A bad block takes nothing away from its neighbours")
  func neighbours() throws {
    try file.write([1, 2, 3], at: intact.dataOffset(region: 0, block: 3))
    let image = try MemoryImage(path: file.path)
    let (run, blocks) = try image.read(region: 0, firstBlock: 2, blockCount: 2)
    #expect(run == ImageRun(kind: .data, blockCount: 1))
    #expect(blocks == [sample.block(0, 2)])
    let comparison = sample.compare(with: image)
    #expect((comparison.right, comparison.wrong, comparison.errors.count) == (2067, 0, 1))
    let text = comparison.errors.first?.description ?? ""
    #expect(text.contains("region 0 (ram0), block 3, file offset"))
  }

  /// Two parts of the image that change places: where, and how many bytes.
  struct Swap: Sendable, CustomTestStringConvertible {
    let testDescription: String
    let first: @Sendable (RawImage) -> Int
    let second: @Sendable (RawImage) -> Int
    /// Blocks of which none may be read.
    let lost: [(region: Int, block: Int)]
  }

  @Test(
    "What landed at a wrong place is damaged",
    arguments: [
      Swap(
        testDescription: "two blocks of a region",
        first: { $0.dataOffset(region: 0, block: 2) },
        second: { $0.dataOffset(region: 0, block: 3) }, lost: [(0, 2), (0, 3)]),
      Swap(
        testDescription: "blocks of two regions",
        first: { $0.dataOffset(region: 0, block: 2) },
        second: { $0.dataOffset(region: 1, block: 1) }, lost: [(0, 2), (1, 1)]),
      Swap(
        testDescription: "two index pages of a region",
        first: { $0.indexOffset(region: 0, page: 0) },
        second: { $0.indexOffset(region: 0, page: 1) }, lost: [(0, 2), (0, 1100)]),
      Swap(
        testDescription: "index pages of two regions",
        first: { $0.indexOffset(region: 0, page: 0) },
        second: { $0.indexOffset(region: 1, page: 0) }, lost: [(0, 2), (1, 1)]),
    ])
  func swapped(swap: Swap) throws {
    let (first, second) = (swap.first(intact), swap.second(intact))
    try file.write(Array(intact.bytes[first..<first + 4096]), at: second)
    try file.write(Array(intact.bytes[second..<second + 4096]), at: first)
    let image = try MemoryImage(path: file.path)
    for (region, block) in swap.lost {
      let error = imageError {
        _ = try image.read(region: region, firstBlock: block, blockCount: 1)
      }
      #expect(error?.code == .damaged)
    }
    #expect(sample.compare(with: image).wrong == 0)
  }

  @Test("A block of another image of the same memory is damaged")
  func otherImage() throws {
    let other = try sample.encoded()
    let index = intact.indexOffset(region: 0)
    try file.write(Array(other.bytes[index..<index + 4096]), at: index)
    let image = try MemoryImage(path: file.path)
    let error = imageError { _ = try image.read(region: 0, firstBlock: 2, blockCount: 1) }
    #expect(error?.code == .damaged)
  }

  @Test("Zeros where a write was lost are damage, not memory of zeros", arguments: [true, false])
  func lostWrite(isIndex: Bool) throws {
    let place =
      isIndex ? intact.indexOffset(region: 0) : intact.dataOffset(region: 0, block: 2)
    try file.write(Sample.zeroBlock, at: place)
    let image = try MemoryImage(path: file.path)
    let error = imageError { _ = try image.read(region: 0, firstBlock: 2, blockCount: 1) }
    #expect(error?.code == .damaged)
  }

  @Test("A file that is cut while it is open is an error at the blocks that are gone")
  func cutWhileOpen() throws {
    let image = try MemoryImage(path: file.path)
    // Index and chunk table, which lie behind the data, are in memory then.
    _ = try image.read(region: 0, firstBlock: 2, blockCount: 1)
    try file.setLength(intact.dataOffset(region: 0, block: 3) + 100)
    let (run, blocks) = try image.read(region: 0, firstBlock: 2, blockCount: 2)
    #expect(run.blockCount == 1)
    #expect(blocks == [sample.block(0, 2)])
    let error = imageError { _ = try image.read(region: 0, firstBlock: 3, blockCount: 1) }
    #expect(error?.code == .truncated)
    #expect(imageError { _ = try image.verify() }?.code == .truncated)
  }

  @Test("What was damaged for a while is read once it is right again")
  func recovers() throws {
    let place = intact.indexOffset(region: 0)
    try file.write(Sample.zeroBlock, at: place)
    let image = try MemoryImage(path: file.path)
    #expect(imageError { _ = try image.read(region: 0, firstBlock: 2, blockCount: 1) } != nil)
    try file.write(Array(intact.bytes[place..<place + 4096]), at: place)
    let (_, blocks) = try image.read(region: 0, firstBlock: 2, blockCount: 2)
    #expect(blocks == [sample.block(0, 2), sample.block(0, 3)], "also in runs again")
  }

  @Test("Verification lists each bad place, also in what was read before, and goes on")
  func verifyLists() throws {
    let image = try MemoryImage(path: file.path)
    #expect(try image.verify().isIntact)
    #expect(sample.compare(with: image).right == 2068)
    let data = intact.dataOffset(region: 0, block: 3)
    let index = intact.indexOffset(region: 0, page: 2)
    try file.write([intact.bytes[data] ^ 1], at: data)
    try file.write([intact.bytes[index + 9] ^ 1], at: index + 9)
    var steps: [Int] = []
    let report = try image.verify { done, total in
      steps.append(done)
      #expect(total == 2068)
    }
    #expect(report.damages.map(\.region) == [0, 0])
    #expect(report.damages.map(\.firstBlock) == [3, 2044])
    #expect(report.damages.map(\.blockCount) == [1, 16])
    #expect(report.damages.map(\.fileOffset) == [data, index])
    #expect(report.damages.map(\.cause) == [.data, .index])
    #expect(report.damagedBlocks == 17)
    #expect(report.zeroBlocks + report.dataBlocks + report.damagedBlocks == 2068)
    #expect(steps == [1022, 2044, 2060, 2068])
  }

  @Test("Verification of a ruined data area counts every block and lists a bounded number")
  func verifyRuined() throws {
    let start = Int(intact.word(RawImage.Header.data))
    let length = Int(intact.word(RawImage.Header.dataLength))
    try file.write([UInt8](repeating: 5, count: length), at: start)
    let report = try MemoryImage(path: file.path).verify()
    let dataBlocks = sample.data.reduce(0) { $0 + $1.count }
    #expect(report.damagedBlocks == dataBlocks)
    #expect(report.dataBlocks == 0)
    #expect(report.zeroBlocks == 2068 - dataBlocks)
    #expect(report.damages.count == min(dataBlocks, VerifyReport.damageLimit))
  }
}
