// SPDX-License-Identifier: Apache-2.0

import LinuxSystem
import MemoryImage
import SystemPackage
import TestSupport
import Testing

@Suite("Verification of a sample reads less, and says what it did not read")
struct VerifySampleTests {
  private let sample = Sample.machine

  @Test("It reads the share that it was asked for, spread, and never nothing")
  func share() throws {
    let file = try ScratchFile(try Sample.machineImage.get().bytes)
    let image = try MemoryImage(path: file.path)
    let whole = try image.verify()
    #expect(!whole.isSample && whole.unreadBlocks == 0 && whole.checkedBlocks == 2068)
    for (share, least, most) in [(0.5, 0.49, 0.51), (0.1, 0.09, 0.11), (1e-9, 0.0005, 0.002)] {
      let report = try image.verify(sample: share, seed: 5)
      #expect(report.isSample && report.isIntact && report.blockCount == 2068)
      #expect(report.zeroBlocks == whole.zeroBlocks)
      #expect(report.dataBlocks + report.unreadBlocks == whole.dataBlocks)
      let found = Double(report.dataBlocks) / Double(whole.dataBlocks)
      #expect(least <= found && found <= most, "\(found) for \(share)")
    }
  }

  @Test("The same seed takes the same sample, others take others", arguments: Sample.encodings)
  func seeds(options: ImageOptions) throws {
    var intact = try sample.encoded(options)
    let data = Int(intact.word(RawImage.Header.data))
    let length = Int(intact.word(RawImage.Header.dataLength))
    // All of one chunk.
    intact.bytes[data + length / 2] ^= 1
    intact.bytes[data + length / 2 + 1] ^= 1
    let file = try ScratchFile(intact.bytes)
    let image = try MemoryImage(path: file.path)
    let found = try (0..<64).map { seed in
      let report = try image.verify(sample: 0.5, seed: UInt64(seed))
      let again = try image.verify(sample: 0.5, seed: UInt64(seed))
      #expect(again.damages == report.damages && again.dataBlocks == report.dataBlocks)
      return !report.isIntact
    }
    // 32 are expected; 8 are 6 standard deviations away.
    #expect((8...56).contains(found.count { $0 }))
  }

  @Test("Damage of index and chunk table is found by every sample", arguments: Sample.encodings)
  func tables(options: ImageOptions) throws {
    let intact = try sample.encoded(options)
    let file = try ScratchFile(intact.bytes)
    let image = try MemoryImage(path: file.path)
    for place in [
      intact.indexOffset(region: 0, page: 1), Int(intact.word(RawImage.Header.chunkTable)),
    ] {
      try file.write([intact.bytes[place] ^ 1], at: place)
      for seed in 0..<4 {
        let report = try image.verify(sample: 0.001, seed: UInt64(seed))
        #expect(report.damages.first?.fileOffset == place)
      }
      try file.write([intact.bytes[place]], at: place)
    }
    #expect(try image.verify(sample: 0.001).isIntact)
  }
}
