// SPDX-License-Identifier: Apache-2.0

import SystemPackage

/// Damages an image in one place (docs/image-format.md).
enum DamagedBlock {
  /// Flips a byte in the data of the first block from the given one on that is not zero, in an
  /// image that holds blocks as they are, and tells which it was.
  static func make(in path: FilePath, from first: Int) throws -> Int {
    let file = try FileDescriptor.open(path, .readWrite)
    return try file.closeAfter {
      let table = try number(file, at: 56)
      let index = try number(file, at: table + 24)
      let data = try number(file, at: 184)
      var block = Int64(first)
      var entry: Int64 = 0
      while entry == 0 {
        entry =
          try number(file, at: index + 4096 * (block / 1022) + 4 * (block % 1022)) & 0xFFFF_FFFF
        if entry == 0 { block += 1 }
      }
      let place = data + 4096 * (entry - 1) + 123
      var byte: [UInt8] = [0]
      _ = try unsafe byte.withUnsafeMutableBytes {
        try unsafe file.read(fromAbsoluteOffset: place, into: $0)
      }
      byte[0] ^= 1
      try file.writeAll(toAbsoluteOffset: place, byte)
      return Int(block)
    }
  }

  private static func number(_ file: FileDescriptor, at offset: Int64) throws -> Int64 {
    var value: UInt64 = 0
    _ = try unsafe withUnsafeMutableBytes(of: &value) {
      try unsafe file.read(fromAbsoluteOffset: offset, into: $0)
    }
    return Int64(truncatingIfNeeded: UInt64(littleEndian: value))
  }
}
