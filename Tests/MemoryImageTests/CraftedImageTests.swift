// SPDX-License-Identifier: Apache-2.0

import LinuxSystem
import MemoryImage
import SystemPackage
import TestSupport
import Testing

/// Changes a field of an image; every checksum is right afterwards.
struct Lie: Sendable, CustomTestStringConvertible {
  let testDescription: String
  let code: ImageError.Code
  let tell: @Sendable (inout RawImage) -> Void

  init(
    _ what: String, _ code: ImageError.Code, _ tell: @escaping @Sendable (inout RawImage) -> Void
  ) {
    testDescription = what
    self.code = code
    self.tell = tell
  }

  /// A lie in the region table.
  static func region(
    _ what: String, _ field: Int, _ value: UInt64, _ code: ImageError.Code = .invalidLayout
  ) -> Lie {
    Lie(what, code) { $0.set($0.region(1, field), word: value) }
  }

  /// A lie in the header.
  static func header(
    _ what: String, _ field: Int, _ value: UInt32, _ code: ImageError.Code
  ) -> Lie {
    Lie(what, code) { $0.set(field, half: value) }
  }

  static let headers: [Lie] = [
    .header("no regions", RawImage.Header.regionCount, 0, .invalidLayout),
    .header("one region less", RawImage.Header.regionCount, 1, .invalidLayout),
    .header("1025 regions", RawImage.Header.regionCount, 1025, .limitExceeded),
    .header("2^32 - 1 regions", RawImage.Header.regionCount, .max, .limitExceeded),
    .header("one state more", RawImage.Header.stateCount, 4, .invalidLayout),
    .header("4097 states", RawImage.Header.stateCount, 4097, .limitExceeded),
    .header("2^32 - 1 states", RawImage.Header.stateCount, .max, .limitExceeded),
    .header("one string more", RawImage.Header.metadataCount, 4, .invalidLayout),
    .header("one string less", RawImage.Header.metadataCount, 2, .invalidLayout),
    .header("2^32 - 1 strings", RawImage.Header.metadataCount, .max, .limitExceeded),
    .header("blocks of 8 KiB", RawImage.Header.blockSize, 8192, .invalidLayout),
    .header("a reserved byte", RawImage.Header.reserved, 1, .invalidLayout),
    .header("the last reserved byte", RawImage.Header.checksum - 4, 1 << 31, .invalidLayout),
    .header("a header of 8 KiB", RawImage.Header.headerLength, 8192, .damaged),
    Lie("a longer file", .truncated) {
      $0.set(RawImage.Header.fileLength, word: UInt64($0.bytes.count + 1))
    },
    Lie("a file beyond the limit", .limitExceeded) {
      $0.set(RawImage.Header.fileLength, word: .max)
    },
    Lie("a shorter file", .invalidLayout) {
      $0.set(RawImage.Header.fileLength, word: UInt64($0.bytes.count - 1))
    },
    Lie("a region table outside of the file", .invalidLayout) {
      $0.set(RawImage.Header.regionTable, word: UInt64($0.bytes.count - 8))
    },
    Lie("a region table at the end of the address space", .invalidLayout) {
      $0.set(RawImage.Header.regionTable, word: .max - 7)
    },
    Lie("a longer region table", .invalidLayout) {
      $0.set(RawImage.Header.regionTable + 8, word: 384)
    },
    Lie("a region table in the header", .invalidLayout) {
      $0.set(RawImage.Header.regionTable, word: 2048)
    },
    Lie("a region table that is not aligned", .invalidLayout) { image in
      let table = Array(image.bytes[4096..<4352])
      image.bytes.replaceSubrange(4097..<4353, with: table)
      image.set(RawImage.Header.regionTable, word: 4097)
    },
    Lie("2 MiB of metadata", .limitExceeded) {
      $0.set(RawImage.Header.metadata + 8, word: 2 << 20)
    },
  ]

  static let chunks: [Lie] = [
    .header("an unknown encoding", RawImage.Header.encoding, 2, .invalidLayout),
    .header("chunks of no blocks", RawImage.Header.blocksPerChunk, 0, .invalidLayout),
    .header("stored chunks of 2 blocks", RawImage.Header.blocksPerChunk, 2, .invalidLayout),
    .header("chunks of 17 blocks", RawImage.Header.blocksPerChunk, 17, .limitExceeded),
    .header("65 ancestors", RawImage.Header.ancestorCount, 65, .limitExceeded),
    .header("a reserved field", RawImage.Header.ancestorCount + 4, 1, .invalidLayout),
    Lie("data that are longer than its chunks", .invalidLayout) {
      $0.set(RawImage.Header.dataLength, word: $0.word(RawImage.Header.dataLength) + 4096)
    },
    Lie("2^33 chunks", .limitExceeded) { $0.set(RawImage.Header.chunkCount, word: 1 << 33) },
    Lie("data outside of the file", .invalidLayout) {
      $0.set(RawImage.Header.data, word: 1 << 40)
    },
    Lie("data that wrap", .invalidLayout) { $0.set(RawImage.Header.data, word: .max - 4095) },
    Lie("data that are not aligned", .invalidLayout) {
      $0.set(RawImage.Header.data, word: $0.word(RawImage.Header.data) + 8)
    },
    Lie("data in the region table", .invalidLayout) { $0.set(RawImage.Header.data, word: 4096) },
    Lie("a chunk table outside of the file", .invalidLayout) {
      $0.set(RawImage.Header.chunkTable, word: 1 << 40)
    },
    Lie("a chunk table that is not aligned", .invalidLayout) {
      $0.set(RawImage.Header.chunkTable, word: $0.word(RawImage.Header.chunkTable) - 8)
    },
    Lie("a chunk table in the index", .invalidLayout) {
      $0.set(RawImage.Header.chunkTable, word: UInt64($0.indexOffset(region: 0)))
    },
  ]

  static let regions: [Lie] = [
    .region("no length", RawImage.Region.length, 0),
    .region("an odd length", RawImage.Region.length, 5000),
    .region("a length of 2^63", RawImage.Region.length, 1 << 63),
    .region("a length of 2^62", RawImage.Region.length, 1 << 62, .limitExceeded),
    .region("a length outside of the file", RawImage.Region.length, 1 << 40),
    .region("the greatest length", RawImage.Region.length, .max),
    .region("a page size of 0", RawImage.Region.pageSize, 0),
    .region("a page size of 64 KiB", RawImage.Region.pageSize, 65_536),
    .region("a page size of 2^63", RawImage.Region.pageSize, 1 << 63),
    .region("a length that is not whole pages", RawImage.Region.pageSize, 2 << 20),
    .region("an address that is not aligned", RawImage.Region.guestAddress, 0x4000_0800),
    .region("the address of another region", RawImage.Region.guestAddress, 0),
    .region("the end of another region", RawImage.Region.guestAddress, 2059 * 4096),
    .region("an address that wraps", RawImage.Region.guestAddress, .max - 4095),
    .region("an index in the header", RawImage.Region.indexOffset, 0),
    .region("an index that is not aligned", RawImage.Region.indexOffset, 8200),
    Lie("the index of another region", .invalidLayout) {
      $0.set(
        $0.region(1, RawImage.Region.indexOffset), word: UInt64($0.indexOffset(region: 0)))
    },
    Lie("an index in the data", .invalidLayout) {
      $0.set($0.region(1, RawImage.Region.indexOffset), word: $0.word(RawImage.Header.data))
    },
    .region("an index outside of the file", RawImage.Region.indexOffset, 1 << 40),
    .region("an index that wraps", RawImage.Region.indexOffset, .max - 4095),
    .region("something in an unused field", RawImage.Region.unused, 4096),
    Lie("no name", .invalidLayout) { $0.set($0.region(1, RawImage.Region.nameLength), half: 0) },
    Lie("a name of 81 bytes", .invalidLayout) {
      $0.set($0.region(1, RawImage.Region.nameLength), half: 81)
    },
    Lie("a name of 2^32 - 1 bytes", .invalidLayout) {
      $0.set($0.region(1, RawImage.Region.nameLength), half: .max)
    },
    Lie("a name that is not UTF-8", .invalidLayout) {
      $0.bytes[$0.region(1, RawImage.Region.name)] = 0xFF
    },
    Lie("bytes after the name", .invalidLayout) {
      $0.bytes[$0.region(1, RawImage.Region.name) + 79] = 1
    },
    Lie("a reserved field", .invalidLayout) {
      $0.set($0.region(1, RawImage.Region.reserved), half: 1)
    },
  ]

  static let states: [Lie] = [
    Lie("a blob outside of the file", .invalidLayout) {
      $0.set($0.state(0, RawImage.State.offset), word: UInt64($0.bytes.count))
    },
    Lie("a blob that wraps", .invalidLayout) {
      $0.set($0.state(0, RawImage.State.length), word: .max)
    },
    Lie("a blob that is not aligned", .invalidLayout) {
      let offset = $0.word($0.state(0, RawImage.State.offset))
      $0.set($0.state(0, RawImage.State.offset), word: offset + 1)
    },
    Lie("a blob in another", .invalidLayout) {
      let offset = $0.word($0.state(0, RawImage.State.offset))
      $0.set($0.state(2, RawImage.State.offset), word: offset)
    },
    Lie("a blob in the data", .invalidLayout) {
      $0.set($0.state(0, RawImage.State.offset), word: $0.word(RawImage.Header.data))
    },
    Lie("a doubled name", .invalidLayout) {
      $0.set($0.state(1, RawImage.State.instance), half: 0)
    },
  ]

  /// Replaces the metadata by as many other bytes.
  static func metadata(_ what: String, _ change: @escaping @Sendable (inout [UInt8]) -> Void) -> Lie
  {
    Lie(what, .invalidLayout) { image in
      guard let table = image.extent(ofTable: RawImage.Header.metadata) else { return }
      var bytes = Array(image.bytes[table])
      change(&bytes)
      image.bytes.replaceSubrange(table, with: bytes)
    }
  }

  /// The sample has "arch" = "x86_64", "empty" = "", "name" = "größe 📀", in this order.
  static let strings: [Lie] = [
    .metadata("a key without bytes") { $0[0] = 0 },
    .metadata("a key of 2^32 - 1 bytes") { $0.replaceSubrange(0..<4, with: [255, 255, 255, 255]) },
    .metadata("a value of 2^32 - 1 bytes") {
      $0.replaceSubrange(4..<8, with: [255, 255, 255, 255])
    },
    .metadata("a key that is not UTF-8") { $0[8] = 0xFF },
    .metadata("a value that is not UTF-8") { $0[12] = 0xC0 },
    .metadata("keys out of order") { $0[8] = UInt8(ascii: "z") },
    .metadata("a shorter value and a byte too many") { $0[4] = 5 },
  ]
}

@Suite("Fields that lie with right checksums are refused")
struct CraftedImageTests {
  @Test(
    "The lie is told by its code, before anything large is allocated",
    arguments: Lie.headers + Lie.chunks + Lie.regions + Lie.states + Lie.strings)
  func lie(lie: Lie) throws {
    var image = try Sample.machineImage.get()
    lie.tell(&image)
    image.reseal()
    let file = try ScratchFile(image.bytes)
    let error = imageError { _ = try MemoryImage(path: file.path) }
    #expect(error?.code == lie.code, "\(error?.description ?? "it was opened")")
  }

  @Test("The helper that reseals makes images that open")
  func resealing() throws {
    var image = try Sample.machineImage.get()
    image.set(image.region(0, RawImage.Region.guestAddress), word: 1 << 40)
    image.reseal()
    let file = try ScratchFile(image.bytes)
    let address = try MemoryImage(path: file.path).regions[0].guestAddress
    #expect(address == GuestAddress(1 << 40))
  }

  @Test("Device states of more than 64 MiB are refused before they are read")
  func enormousState() throws {
    var image = try Sample.smallMachineImage.get()
    let offset = (image.bytes.count + 7) & ~7
    let length = ImageLimits.stateBytes
    image.set(RawImage.Header.fileLength, word: UInt64(offset + length))
    image.set(image.state(0, RawImage.State.offset), word: UInt64(offset))
    image.set(image.state(0, RawImage.State.length), word: UInt64(length))
    image.reseal()
    let file = try ScratchFile(image.bytes)
    try file.setLength(offset + length)
    #expect(imageError { _ = try MemoryImage(path: file.path) }?.code == .limitExceeded)
  }

  @Test("A region of 256 TiB in a file of holes opens at once, and has no wrong memory")
  func enormous() throws {
    var image = try Sample.smallMachineImage.get()
    let length = 1 << 48
    let indexLength = (length / 4096 + 1021) / 1022 * 4096
    let index = (image.bytes.count + 4095) & ~4095
    image.set(RawImage.Header.fileLength, word: UInt64(index + indexLength))
    image.set(image.region(1, RawImage.Region.length), word: UInt64(length))
    image.set(image.region(1, RawImage.Region.indexOffset), word: UInt64(index))
    image.reseal()
    let file = try ScratchFile(image.bytes)
    try file.setLength(index + indexLength)
    let opened = try MemoryImage(path: file.path)
    #expect(opened.regions[1].length == length)
    let last = length / 4096 - 1
    let error = imageError { _ = try opened.read(region: 1, firstBlock: last, blockCount: 1) }
    #expect(error?.code == .damaged)
  }

  @Test(
    "Thousands of random changes never trap and never give wrong memory",
    arguments: [0x1CEB_00DA, 0xBADC_AB1E] as [UInt64], [false, true])
  func fuzz(seed: UInt64, resealed: Bool) throws {
    var random = SeededRandom(seed: seed)
    let intact = try Sample.smallMachineImage.get()
    let sample = Sample.smallMachine
    let interesting: [UInt64] = [
      0, 1, 7, 511, 512, 4095, 4096, 8192, 1 << 20, 1 << 31, 1 << 32, 1 << 48, 1 << 62, 1 << 63,
      .max - 4095, .max, UInt64(intact.bytes.count),
    ]
    var (opened, wrong) = (0, 0)
    for _ in 0..<1000 {
      var image = intact
      for _ in 0..<Int.random(in: 1...4, using: &random) {
        image.mutate(interesting, &random)
      }
      if resealed, image.bytes.count >= 4096 { image.reseal() }
      let file = try ScratchFile(image.bytes)
      var reader: MemoryImage?
      _ = imageError { reader = try MemoryImage(path: file.path) }
      guard let reader else { continue }
      opened += 1
      // A resealed image may say that it has other regions: then only trapping counts, and
      // not for more blocks than a debug build can read.
      guard reader.regions.allSatisfy({ $0.length <= 1 << 24 }) else { continue }
      let comparison = sample.compare(with: reader, limit: 9)
      if !resealed { wrong += comparison.wrong }
      _ = try? reader.verify()
    }
    #expect(wrong == 0, "seed \(seed)")
    #expect(opened > 0, "the fuzzer also gets past opening")
  }
}

extension RawImage {
  /// One random change: mostly to fields, for these decide what is read.
  fileprivate mutating func mutate(_ interesting: [UInt64], _ random: inout SeededRandom) {
    guard bytes.count >= 8192 else { return }
    let size = bytes.count
    switch Int.random(in: 0..<8, using: &random) {
    case 0:
      bytes[Int.random(in: 0..<size, using: &random)] ^= UInt8.random(in: 1...255, using: &random)
    case 1:
      let offset = Int.random(in: 1..<size / 8 - 1, using: &random) * 8
      set(offset, word: interesting.randomElement(using: &random) ?? 0)
    case 2, 3:
      let offset = 4096 + Int.random(in: 0..<32, using: &random) * 8
      set(offset, word: interesting.randomElement(using: &random) ?? 0)
    case 4:
      let offset = Int.random(in: 2..<32, using: &random) * 4
      set(offset, half: UInt32(truncatingIfNeeded: interesting.randomElement(using: &random) ?? 0))
    case 5:
      let first = Int.random(in: 2..<size / 4096, using: &random) * 4096
      let second = Int.random(in: 2..<size / 4096, using: &random) * 4096
      for index in 0..<4096 { bytes.swapAt(first + index, second + index) }
    case 6:
      let offset = Int.random(in: 8192 / 8..<size / 8 - 1, using: &random) * 8
      set(offset, word: random.next())
    default:
      if Int.random(in: 0..<4, using: &random) == 0 {
        bytes.removeLast(Int.random(in: 1..<4096, using: &random))
      } else {
        bytes[size - Int.random(in: 1...400, using: &random)] = UInt8.random(
          in: 0...255, using: &random)
      }
    }
  }
}
