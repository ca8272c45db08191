// SPDX-License-Identifier: Apache-2.0

import CXXHash
import LinuxSystem
import SystemPackage

/// A stored image of which every block is data and a chunk of its own, made from
/// docs/image-format.md: the largest index and chunk table that memory of a size can have.
///
/// The data are a hole in the file: zeros with right checksums. In a chain of `images` the
/// one with number `n` holds each block `b` with `b % images == n`.
struct SparseImage {
  let blocks: Int
  let images: Int
  let number: Int

  private var own: Int { blocks / images }
  private var indexPages: Int { (blocks + 1021) / 1022 }
  private var tablePages: Int { (own + 510) / 511 }
  private let data = 8192
  private var index: Int { data + own * 4096 }
  private var table: Int { index + indexPages * 4096 }
  private var tail: Int { table + tablePages * 4096 }

  /// Writes it as `image` and its number.
  func write(in directory: FilePath) throws {
    let file = try FileDescriptor.open(
      directory.appending("image\(number)"), .readWrite, options: .create,
      permissions: .ownerReadWrite)
    try file.closeAfter {
      let ancestors = ancestorTable
      try file.resize(to: Int64(tail + ancestors.count))
      let head = head(ancestors)
      try file.writeAll(toAbsoluteOffset: 0, head.bytes)
      try file.writeAll(toAbsoluteOffset: Int64(tail), ancestors)
      for page in 0..<indexPages {
        try file.writeAll(
          toAbsoluteOffset: Int64(index + page * 4096), indexPage(page, key: head.key(5)))
      }
      for page in 0..<tablePages {
        try file.writeAll(
          toAbsoluteOffset: Int64(table + page * 4096),
          tablePage(page, key: head.key(7), chunkKey: head.key(6)))
      }
    }
  }

  private func contentID(_ number: Int) -> [UInt8] {
    [UInt8](repeating: UInt8(number + 1), count: 32)
  }

  private var ancestorTable: [UInt8] {
    (0..<number).flatMap { ancestor in
      contentID(ancestor) + RawImage.littleEndian(UInt64(own)) + RawImage.littleEndian(1 | 6 << 32)
        + Array("image\(ancestor)\0\0".utf8)
    }
  }

  /// Header and region table.
  private func head(_ ancestors: [UInt8]) -> RawImage {
    typealias Header = RawImage.Header
    let region = 4096
    var image = RawImage(bytes: [UInt8](repeating: 0, count: data))
    image.bytes.replaceSubrange(0..<8, with: [0x89, 0x46, 0x4C, 0x49, 0x4D, 0x47, 0x0D, 0x0A])
    for (field, half) in [
      (Header.version, 2), (Header.headerLength, 4096), (Header.id, 77), (Header.id + 4, number),
      (Header.regionCount, 1), (Header.blockSize, 4096), (Header.blocksPerChunk, 1),
      (Header.ancestorCount, number), (region + RawImage.Region.nameLength, 1),
    ] {
      image.set(field, half: UInt32(half))
    }
    for (field, word) in [
      (Header.fileLength, tail + ancestors.count), (Header.regionTable, region),
      (Header.regionTable + 8, 128), (Header.stateTable, tail), (Header.metadata, tail),
      (Header.ancestors, tail), (Header.ancestors + 8, ancestors.count),
      (Header.chunkTable, table), (Header.chunkCount, own), (Header.data, data),
      (Header.dataLength, own * 4096), (region + RawImage.Region.length, blocks * 4096),
      (region + RawImage.Region.pageSize, 4096), (region + RawImage.Region.indexOffset, index),
    ] {
      image.set(field, word: UInt64(word))
    }
    image.bytes.replaceSubrange(Header.contentID..<Header.contentID + 32, with: contentID(number))
    image.bytes[region + RawImage.Region.name] = UInt8(ascii: "r")
    for (tag, header, bytes) in [
      (1, Header.regionTable, Array(image.bytes[region..<region + 128])),
      (2, Header.stateTable, []), (3, Header.metadata, []), (8, Header.ancestors, ancestors),
    ] {
      image.set(header + 16, word: RawImage.hash(bytes, seed: image.key(UInt64(tag))))
    }
    image.resealHeader()
    return image
  }

  private func indexPage(_ page: Int, key: UInt64) -> [UInt8] {
    var words = [UInt64](repeating: 0, count: 512)
    for slot in 0..<1022 {
      let (chunk, image) = (page * 1022 + slot).quotientAndRemainder(dividingBy: images)
      guard chunk < own else { break }
      words[slot / 2] |= UInt64(image * own + chunk + 1) << (slot % 2 == 0 ? 0 : 32)
    }
    return sealed(words, seed: key &+ RawImage.step &* UInt64(page))
  }

  private func tablePage(_ page: Int, key: UInt64, chunkKey: UInt64) -> [UInt8] {
    var words = [UInt64](repeating: 0, count: 512)
    for slot in 0..<min(511, own - page * 511) {
      let seed = chunkKey &+ RawImage.step &* UInt64(page * 511 + slot)
      words[slot] = unsafe XXH_INLINE_XXH3_64bits_withSeed(Sample.zeroBlock, 4096, seed)
    }
    return sealed(words, seed: key &+ RawImage.step &* UInt64(page))
  }

  /// The bytes of a page whose last word is its checksum.
  private func sealed(_ words: [UInt64], seed: UInt64) -> [UInt8] {
    var words = words
    words[511] = unsafe XXH_INLINE_XXH3_64bits_withSeed(words, 4088, seed)
    return unsafe words.withUnsafeBytes { unsafe Array($0) }
  }
}
