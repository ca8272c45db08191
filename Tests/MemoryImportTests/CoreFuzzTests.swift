// SPDX-License-Identifier: Apache-2.0

import Foundation
import LinuxSystem
import MemoryImage
import MemoryImport
import SystemPackage
import TestSupport
import Testing

/// A file in memory that has a path.
private struct ScratchFile: ~Copyable {
  let file: MemoryFile

  init() throws { file = try MemoryFile(name: "core", length: 4096) }

  var path: FilePath { FilePath("/proc/self/fd/\(file.descriptor.rawValue)") }

  func set(_ bytes: [UInt8]) throws {
    try file.descriptor.setLength(0)
    try unsafe bytes.withUnsafeBytes { try unsafe file.descriptor.writeAll($0, at: 0) }
  }
}

@Suite("Whatever the headers of a core say, it is read or refused, soon")
struct CoreFuzzTests {
  /// What mutations start from: small cores of each kind.
  static let corpus: [[UInt8]] = {
    var random = Random(seed: 1)
    func segment(_ address: UInt64, _ pages: Int, _ more: UInt64 = 0) -> CoreBuilder.Segment {
      let bytes = random.bytes(pages * 4096)
      return CoreBuilder.Segment(
        address: address, bytes: bytes, memoryLength: UInt64(bytes.count) + more)
    }
    var guest = CoreBuilder()
    guest.segments = [segment(0x10_0000, 2), segment(0, 1), segment(0x1000, 1)]
    var process = CoreBuilder(isGuest: false)
    process.segments = [segment(0x7f00_0000_0000, 1, 8192), segment(0x40_0000, 2)]
    var extended = CoreBuilder(isExtended: true)
    extended.segments = (0..<12).map { segment(UInt64($0) * 8192, 1) }
    return [guest, process, extended].map { $0.encoded() }
  }()

  /// Values that limits and overflows are near to.
  private static let words: [UInt64] = [
    0, 1, 2, 55, 56, 4095, 4096, 4097, 8192, 0xffff, 0x10000, 1 << 31, 0xffff_ffff, 1 << 32,
    1 << 50, 1 << 62, 1 << 63, .max, .max - 4095, .max - 4096, 128, 184, 240,
  ]

  @Test("Thousands of mutations end in a value or an error", arguments: 0..<3)
  func mutations(of number: Int) throws {
    let scratch = try ScratchFile()
    let original = Self.corpus[number]
    var random = Random(seed: UInt64(number))
    var (read, refused) = (0, 0)
    let start = ContinuousClock.now
    for round in 0..<4000 {
      var bytes = original
      for _ in 0..<Int.random(in: 1...4, using: &random) { Self.mutate(&bytes, &random) }
      try scratch.set(bytes)
      let kinds: [CoreFile.Kind?] = [nil, .guest, .process]
      do {
        let core = try CoreFile(scratch.path, kind: kinds[round % 3])
        try Self.use(core, length: bytes.count)
        read += 1
      } catch is ImportError {
        refused += 1
      }
    }
    #expect(read > 100 && refused > 100, "\(read) read, \(refused) refused")
    #expect(ContinuousClock.now - start < .seconds(60))
  }

  /// Changes a header: bits, words that hurt, words from elsewhere; or the file's length.
  private static func mutate(_ bytes: inout [UInt8], _ random: inout Random) {
    guard bytes.count >= 16 else { return }
    let headers = min(bytes.count, 128 + 56 * 14 + 128)
    let place = Int.random(in: 0..<headers - 8, using: &random)
    switch Int.random(in: 0..<8, using: &random) {
    case 0: bytes[place] ^= 1 << UInt8.random(in: 0..<8, using: &random)
    case 1: bytes[place] = UInt8.random(in: 0...255, using: &random)
    case 2, 3, 4:
      bytes.set(place & ~7, words[Int.random(in: 0..<words.count, using: &random)])
    case 5:
      bytes.set(
        place & ~3,
        UInt32(truncatingIfNeeded: words[Int.random(in: 0..<words.count, using: &random)])
      )
    case 6:
      let other = Int.random(in: 0..<headers - 8, using: &random) & ~7
      for index in 0..<8 { bytes[place & ~7 + index] = bytes[other + index] }
    default:
      if Int.random(in: 0..<4, using: &random) == 0 {
        bytes.removeLast(Int.random(in: 0..<bytes.count, using: &random))
      }
    }
  }

  /// What was accepted keeps its promises.
  private static func use(_ core: CoreFile, length: Int) throws {
    for segment in core.noteSegments { _ = try core.bytes(of: segment) }
    for (number, region) in core.input.regions.enumerated() {
      #expect(region.length > 0 && region.length % 4096 == 0)
      var end = 0
      while let extent = try core.input.nextExtent(region: number, from: end) {
        #expect(extent.offset >= end && extent.length > 0)
        #expect(extent.offset + extent.length <= region.length)
        #expect(extent.fileOffset >= 0 && extent.fileOffset + extent.length <= length)
        end = extent.offset + extent.length
      }
      for offset in [0, region.length - 4096] {
        _ = try core.input.bytes(region: number, offset: offset, count: 4096)
      }
    }
  }
}
