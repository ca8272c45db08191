// SPDX-License-Identifier: Apache-2.0

import LinuxSystem
import SystemPackage
import TestSupport

extension RawImage {
  /// Where the entries of the chunk table lie, and how long each is; pages follow each other.
  private var chunkTable: (offset: Int, pages: Int, entries: Int)? {
    let isStored = half(Header.encoding) == 0
    let entries = isStored ? 511 : 255
    let chunks = word(Header.chunkCount)
    let offset = word(Header.chunkTable)
    guard chunks <= 1 << 20, offset <= UInt64(bytes.count) else { return nil }
    return (Int(offset), (Int(chunks) + entries - 1) / entries, entries)
  }

  /// Index pages that lie in the file: region, page, offset.
  private var indexPages: [(region: Int, page: Int, offset: Int)] {
    guard let table = extent(ofTable: Header.regionTable) else { return [] }
    var pages: [(Int, Int, Int)] = []
    for region in 0..<min(table.count / Region.size, 8) {
      let entry = table.lowerBound + region * Region.size
      let (length, offset) = (word(entry + Region.length), word(entry + Region.indexOffset))
      guard length <= 1 << 24, offset <= UInt64(bytes.count) else { continue }
      for page in 0..<(Int(length) / 4096 + 1021) / 1022 {
        pages.append((region, page, Int(offset) + page * 4096))
      }
    }
    return pages
  }

  /// Where the working set begins, if there is room for one.
  private var workingSet: Int? {
    let length = word(Header.fileLength)
    return length >= 4096 && length + 32 <= UInt64(bytes.count) ? Int(length) : nil
  }

  /// Gives index pages, pages of the chunk table and the working set the right checksums,
  /// and then all that `reseal` does.
  mutating func resealAll() {
    for (region, page, offset) in indexPages where offset + 4096 <= bytes.count {
      sealPage(offset, seed: key(5, region) &+ Self.step &* UInt64(page))
    }
    if let table = chunkTable {
      for page in 0..<table.pages where table.offset + (page + 1) * 4096 <= bytes.count {
        sealPage(table.offset + page * 4096, seed: key(7) &+ Self.step &* UInt64(page))
      }
    }
    if let section = workingSet {
      set(section + 16, word: Self.hash(bytes[(section + 32)...], seed: key(9)))
      set(section + 24, word: Self.hash(bytes[section..<section + 24], seed: key(9)))
    }
    reseal()
  }

  private mutating func sealPage(_ offset: Int, seed: UInt64) {
    set(offset + 4088, word: Self.hash(bytes[offset..<offset + 4088], seed: seed))
  }

  // MARK: - Changes

  /// One random change of something that decides what is read.
  mutating func mutateFormat(_ random: inout SeededRandom) {
    guard bytes.count >= 8192 else { return }
    switch Int.random(in: 0..<9, using: &random) {
    case 0:
      let offset = Int.random(in: 16..<232 / 4, using: &random) * 4
      set(offset, half: UInt32(truncatingIfNeeded: Self.number(&random)))
    case 1, 2:
      guard let page = indexPages.randomElement(using: &random) else { return }
      let offset = page.offset + Int.random(in: 0..<40, using: &random) * 4
      let near = UInt64.random(in: 0...40, using: &random)
      put(Bool.random(using: &random) ? near : Self.number(&random), at: offset, size: 4)
    case 3, 4: mutateChunkEntry(&random)
    case 5: mutateFrame(&random)
    case 6:
      guard let table = extent(ofTable: Header.ancestors), table.count >= 48 else { return }
      let offset = table.lowerBound + Int.random(in: 0..<table.count / 4, using: &random) * 4
      put(Self.number(&random), at: offset, size: 4)
    case 7:
      guard let section = workingSet else { return }
      let words = (bytes.count - section) / 8
      let offset = section + 8 * Int.random(in: 0..<words, using: &random)
      put(Self.number(&random), at: offset, size: Bool.random(using: &random) ? 4 : 8)
    default:
      if Bool.random(using: &random) {
        bytes.removeLast(Int.random(in: 1...64, using: &random))
      } else {
        bytes[Int.random(in: 0..<bytes.count, using: &random)] ^=
          1
          << UInt8.random(
            in: 0..<8, using: &random)
      }
    }
  }

  /// Numbers that readers get wrong.
  private static func number(_ random: inout SeededRandom) -> UInt64 {
    let edges: [UInt64] = [
      0, 1, 2, 15, 16, 17, 255, 256, 4095, 4096, 4097, 8192, 65_536, 1 << 20, 1 << 31, 1 << 32,
      1 << 44, 1 << 63, .max - 4095, .max,
    ]
    switch Int.random(in: 0..<3, using: &random) {
    case 0: return random.next()
    case 1: return UInt64.random(in: 0..<64, using: &random)
    default: return edges.randomElement(using: &random) ?? 0
    }
  }

  private mutating func put(_ value: UInt64, at offset: Int, size: Int) {
    guard offset + 8 <= bytes.count else { return }
    if size == 4 {
      set(offset, half: UInt32(truncatingIfNeeded: value))
    } else {
      set(offset, word: value)
    }
  }

  private mutating func mutateChunkEntry(_ random: inout SeededRandom) {
    guard let table = chunkTable, table.pages > 0 else { return }
    let size = table.entries == 255 ? 16 : 8
    let offset = table.offset + size * Int.random(in: 0..<8, using: &random)
    guard size == 16, Bool.random(using: &random) else {
      return put(Self.number(&random), at: offset, size: 8)
    }
    // The place or the length by itself.
    guard offset + 8 <= bytes.count else { return }
    let place = word(offset)
    let mask: UInt64 = 1 << 20 - 1
    put(
      Bool.random(using: &random)
        ? place & ~mask | Self.number(&random) & mask : place & mask | Self.number(&random) << 20,
      at: offset, size: 8)
  }

  /// Changes the data: a few bytes of a frame, or a frame that promises much.
  private mutating func mutateFrame(_ random: inout SeededRandom) {
    let (start, length) = (word(Header.data), word(Header.dataLength))
    guard length > 32, start < UInt64(bytes.count), length <= UInt64(bytes.count) - start
    else { return }
    if Bool.random(using: &random) {
      for _ in 0..<Int.random(in: 1...4, using: &random) {
        let offset = Int(start) + Int.random(in: 0..<Int(length), using: &random)
        bytes[offset] = UInt8.random(in: 0...255, using: &random)
      }
      return
    }
    // A frame of RLE blocks of 128 KiB whose header says some length.
    let claims: [UInt64] = [4096, 8192, 16_384, 1 << 20, 1 << 32, .max]
    var frame: [UInt8] = [0x28, 0xB5, 0x2F, 0xFD, 0xE0]
    frame += Self.littleEndian(claims.randomElement(using: &random) ?? 0)
    for _ in 0..<4 { frame += [0x02, 0x00, 0x10, 0x41] }
    frame += [0x03, 0x00, 0x10, 0x41]
    // At the place of a chunk, where there is one.
    var place = Int(start)
    if let table = chunkTable, table.entries == 255 {
      let entry = table.offset + 16 * Int.random(in: 0..<4, using: &random)
      let chunk = entry + 8 <= bytes.count ? word(entry) >> 20 : 0
      if chunk < length - 32 { place += Int(chunk) }
    }
    for (index, byte) in frame.enumerated() where place + index < Int(start + length) {
      bytes[place + index] = byte
    }
  }
}
