// SPDX-License-Identifier: Apache-2.0

import CCrypto
import CXXHash
import LinuxSystem
import SystemPackage

/// The bytes of an image as docs/image-format.md describes them.
///
/// Written from the document and not from the code under test: it makes images that lie
/// with correct checksums, and images to compare with.
struct RawImage {
  var bytes: [UInt8]

  /// Fields of the header, by offset.
  enum Header {
    static let version = 8
    static let headerLength = 12
    static let fileLength = 16
    static let id = 24
    static let regionCount = 40
    static let stateCount = 44
    static let metadataCount = 48
    static let blockSize = 52
    static let regionTable = 56
    static let stateTable = 80
    static let metadata = 104
    static let encoding = 128
    static let blocksPerChunk = 132
    static let ancestorCount = 136
    static let ancestors = 144
    static let chunkTable = 168
    static let chunkCount = 176
    static let data = 184
    static let dataLength = 192
    static let contentID = 200
    static let reserved = 232
    static let checksum = 4088
  }

  /// Fields of an entry of the region table, by offset.
  enum Region {
    static let size = 128
    static let guestAddress = 0
    static let length = 8
    static let pageSize = 16
    static let indexOffset = 24
    static let unused = 32
    static let nameLength = 40
    static let reserved = 44
    static let name = 48
  }

  /// Fields of an entry of the device-state table, by offset.
  enum State {
    static let size = 32
    static let instance = 4
    static let offset = 8
    static let length = 16
    static let checksum = 24
  }

  // MARK: - Fields

  func word(_ offset: Int) -> UInt64 {
    (0..<8).reversed().reduce(0) { $0 << 8 | UInt64(bytes[offset + $1]) }
  }

  func half(_ offset: Int) -> UInt32 { UInt32(truncatingIfNeeded: word(offset)) }

  mutating func set(_ offset: Int, word: UInt64) { set(offset, word, size: 8) }

  mutating func set(_ offset: Int, half: UInt32) { set(offset, UInt64(half), size: 4) }

  private mutating func set(_ offset: Int, _ value: UInt64, size: Int) {
    for index in 0..<size {
      bytes[offset + index] = UInt8(truncatingIfNeeded: value >> (8 * index))
    }
  }

  /// Where a table is; `nil` when the fields lead out of the file.
  func extent(ofTable header: Int) -> Range<Int>? {
    range(word(header), word(header + 8))
  }

  private func range(_ offset: UInt64, _ length: UInt64) -> Range<Int>? {
    let count = UInt64(bytes.count)
    guard offset <= count, length <= count - offset else { return nil }
    return Int(offset)..<Int(offset + length)
  }

  var regionTable: Int { Int(word(Header.regionTable)) }
  var stateTable: Int { Int(word(Header.stateTable)) }

  func region(_ number: Int, _ field: Int) -> Int {
    regionTable + number * Region.size + field
  }

  func state(_ number: Int, _ field: Int) -> Int { stateTable + number * State.size + field }

  /// The number of a stored block, of one that is not zero.
  func number(region: Int, block: Int) -> Int {
    Int(half(indexOffset(region: region, page: block / 1022) + block % 1022 * 4)) - 1
  }

  /// Where a block of a stored image lies.
  func dataOffset(region: Int, block: Int) -> Int {
    Int(word(Header.data)) + number(region: region, block: block) * 4096
  }

  func indexOffset(region number: Int, page: Int = 0) -> Int {
    Int(word(region(number, Region.indexOffset))) + page * 4096
  }

  // MARK: - Checksums

  static func hash(_ bytes: some Sequence<UInt8>, seed: UInt64) -> UInt64 {
    let bytes = Array(bytes)
    let hash = unsafe bytes.withUnsafeBytes {
      unsafe XXH_INLINE_XXH3_64bits_withSeed($0.baseAddress, $0.count, seed)
    }
    return hash == 0 ? 1 : hash
  }

  static func sha256(_ bytes: [UInt8]) -> [UInt8] {
    var hash = [UInt8](repeating: 0, count: 32)
    _ = unsafe EVP_Digest(bytes, bytes.count, &hash, nil, EVP_sha256(), nil)
    return hash
  }

  static func littleEndian(_ word: UInt64) -> [UInt8] {
    (0..<8).map { UInt8(truncatingIfNeeded: word >> (8 * $0)) }
  }

  func key(_ tag: UInt64, _ number: Int = 0) -> UInt64 {
    let id = Array(bytes[Header.id..<Header.id + 16])
    return unsafe id.withUnsafeBytes {
      unsafe XXH_INLINE_XXH3_64bits_withSeed($0.baseAddress, 16, tag << 32 | UInt64(number))
    }
  }

  static let step: UInt64 = 0x9E37_79B9_7F4A_7C15

  /// Gives every table, blob and the header the right checksum, whatever they say, as far
  /// as they can be found.
  mutating func reseal() {
    if let table = extent(ofTable: Header.stateTable) {
      for number in 0..<table.count / State.size {
        let entry = table.lowerBound + number * State.size
        guard let blob = range(word(entry + State.offset), word(entry + State.length)) else {
          continue
        }
        set(entry + State.checksum, word: Self.hash(bytes[blob], seed: key(4, number)))
      }
    }
    for (tag, header) in [
      (1, Header.regionTable), (2, Header.stateTable), (3, Header.metadata),
      (8, Header.ancestors),
    ] {
      guard let table = extent(ofTable: header) else { continue }
      set(header + 16, word: Self.hash(bytes[table], seed: key(UInt64(tag))))
    }
    resealHeader()
  }

  mutating func resealHeader() {
    set(Header.checksum, word: Self.hash(bytes[..<Header.checksum], seed: 0))
  }
}

// MARK: - Files

/// A file in memory that has a path and whose bytes can be changed while it is open.
final class ScratchFile: Sendable {
  private let file: MemoryFile

  init(_ bytes: [UInt8]) throws {
    file = try MemoryFile(name: "image", length: (max(bytes.count, 1) + 4095) & ~4095)
    try write(bytes, at: 0)
    try setLength(bytes.count)
  }

  var path: FilePath { FilePath("/proc/self/fd/\(file.descriptor.rawValue)") }

  func write(_ bytes: [UInt8], at offset: Int) throws {
    try unsafe bytes.withUnsafeBytes {
      try unsafe file.descriptor.writeAll($0, at: offset)
    }
  }

  func setLength(_ length: Int) throws { try file.descriptor.setLength(length) }
}

/// All bytes of a file.
func contents(of path: FilePath) throws -> [UInt8] {
  let file = try OwnedDescriptor(openingForReading: path)
  var bytes = [UInt8](repeating: 0, count: try file.status.length)
  try unsafe bytes.withUnsafeMutableBytes { try unsafe file.readAll(into: $0, at: 0) }
  return bytes
}
