// SPDX-License-Identifier: Apache-2.0

import CXXHash
import LinuxSystem
import MemoryImage
import SystemPackage
import TestSupport
import Testing

@Suite("Reading all of a range")
struct GatherTests {
  /// Memory as a guest has it: zeros here and there, and a few blocks that come again and again.
  private static let sample: Sample = {
    var random = SeededRandom(seed: 3)
    let common = (0..<80).map { _ in Sample.randomBlock(&random) }
    var sample = Sample(seed: 3, blocks: [2000])
    for block in 0..<2000 {
      switch random.below(8) {
      case 0: sample.data[0][block] = nil
      case 1: sample.data[0][block] = common[random.below(common.count)]
      default: sample.data[0][block] = Sample.randomBlock(&random)
      }
    }
    // Further than one call of the kernel reaches.
    for block in 400..<600 { sample.data[0][block] = block % 2 == 0 ? nil : common[block % 7] }
    for block in 700..<900 where block % 2 == 0 { sample.data[0][block] = nil }
    return sample
  }()

  @Test("Every block is right, wherever equal blocks and zeros lie", arguments: Sample.encodings)
  func everyBlock(options: ImageOptions) throws {
    try withTemporaryDirectory { directory in
      let path = FilePath(directory).appending("image")
      try Self.sample.write(to: path, options)
      let image = try MemoryImage(path: path)
      for limit in [1, 7, 64, 2000] {
        let comparison = Self.sample.compare(with: image, limit: limit)
        #expect((comparison.right, comparison.wrong) == (2000, 0))
        #expect(comparison.errors.isEmpty)
      }
    }
  }

  @Test("It ends before enough zeros, and nowhere else")
  func ends() throws {
    try withTemporaryDirectory { directory in
      let path = FilePath(directory).appending("image")
      var random = SeededRandom(seed: 4)
      var sample = Sample(seed: 4, blocks: [40])
      for block in 0..<40 { sample.data[0][block] = Sample.randomBlock(&random) }
      for block in [0, 1, 5, 10, 11, 12, 20, 21, 22, 23] { sample.data[0][block] = nil }
      try sample.write(to: path)
      let image = try MemoryImage(path: path)
      func run(_ first: Int, _ zeros: Int) throws -> ImageRun {
        try image.read(region: 0, firstBlock: first, blockCount: 40 - first, zeros: zeros).run
      }
      #expect(try run(0, 2) == ImageRun(kind: .zero, blockCount: 2))
      #expect(try run(0, 3) == ImageRun(kind: .data, blockCount: 10))
      #expect(try run(2, 3) == ImageRun(kind: .data, blockCount: 8))
      #expect(try run(2, 4) == ImageRun(kind: .data, blockCount: 18))
      #expect(try run(2, 5) == ImageRun(kind: .data, blockCount: 38))
      #expect(try run(20, 4) == ImageRun(kind: .zero, blockCount: 4))
    }
  }

  @Test("Damaged blocks, any of them, are named, and the others are right", arguments: [0, 1])
  func damage(encoding: Int) throws {
    let intact = try Self.sample.encoded(Sample.encodings[encoding])
    let file = try ScratchFile(intact.bytes)
    var random = SeededRandom(seed: 5)
    for _ in 0..<40 {
      let place = 4096 + random.below(intact.bytes.count - 4096)
      try file.write([intact.bytes[place] ^ 0x10], at: place)
      if let image = try? MemoryImage(path: file.path) {
        let comparison = Self.sample.compare(with: image)
        #expect(comparison.wrong == 0)
        #expect(comparison.right + comparison.errors.count == 2000)
      }
      try file.write([intact.bytes[place]], at: place)
    }
  }

  @Test("A checksum is the same with any instructions", arguments: [0, 1, 16, 240, 512, 513, 4088])
  func checksum(length: Int) {
    var random = SeededRandom(seed: 6)
    let bytes = (0..<4096).map { _ in UInt8(truncatingIfNeeded: random.next()) }
    let seed = random.next()
    unsafe bytes.withUnsafeBytes { bytes in
      let start = bytes.baseAddress
      #expect(
        unsafe cxxhash_64(start, length, seed)
          == XXH_INLINE_XXH3_64bits_withSeed(start, length, seed))
      let (wide, narrow) = unsafe (
        cxxhash_128(start, length, seed), XXH_INLINE_XXH3_128bits_withSeed(start, length, seed)
      )
      #expect((wide.low64, wide.high64) == (narrow.low64, narrow.high64))
    }
  }
}
