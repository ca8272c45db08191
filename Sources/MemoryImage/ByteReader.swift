// SPDX-License-Identifier: Apache-2.0

/// Reads little-endian integers one after the other.
///
/// The caller makes sure that the bytes are there; reading past the end traps.
struct ByteReader {
  private let bytes: [UInt8]
  private(set) var position: Int

  init(_ bytes: [UInt8], from position: Int = 0) {
    self.bytes = bytes
    self.position = position
  }

  /// Bytes not read yet.
  var remaining: Int { bytes.count - position }

  mutating func next<Integer: FixedWidthInteger>() -> Integer {
    let value = Self.integer(Integer.self, of: bytes, at: position)
    position += MemoryLayout<Integer>.size
    return value
  }

  mutating func next(count: Int) -> ArraySlice<UInt8> {
    defer { position += count }
    return bytes[position..<position + count]
  }

  static func integer<Integer: FixedWidthInteger>(
    _ type: Integer.Type, of bytes: [UInt8], at offset: Int
  ) -> Integer {
    var value: Integer = 0
    for index in (0..<MemoryLayout<Integer>.size).reversed() {
      value = value << 8 | Integer(truncatingIfNeeded: bytes[offset + index])
    }
    return value
  }
}

extension [UInt8] {
  /// Appends an integer, little-endian.
  mutating func append(integer: some FixedWidthInteger) {
    var rest = integer
    for _ in 0..<integer.bitWidth / 8 {
      append(UInt8(truncatingIfNeeded: rest))
      rest >>= 8
    }
  }

  mutating func append(zeros count: Int) {
    append(contentsOf: repeatElement(0, count: count))
  }
}
