// SPDX-License-Identifier: Apache-2.0

internal import CXXHash

/// The checksums and seeds of the format (docs/image-format.md, "Checksums").
enum Checksum {
  /// What a seed is for; the numbers are part of the format.
  enum Tag: UInt64 {
    case regionTable = 1
    case stateTable = 2
    case metadata = 3
    case state = 4
    case index = 5
    case chunk = 6
    case chunkTable = 7
    case ancestors = 8
    case workingSet = 9
  }

  /// XXH3-64, never 0.
  ///
  /// SAFETY: the caller vouches for `length` readable bytes at `bytes`.
  @inline(__always)
  @unsafe static func of(_ bytes: UnsafeRawPointer, length: Int, seed: UInt64) -> UInt64 {
    let hash = unsafe cxxhash_64(bytes, length, seed)
    return hash == 0 ? 1 : hash
  }

  /// XXH3-64, never 0.
  @unsafe static func of(_ bytes: UnsafeRawBufferPointer, seed: UInt64) -> UInt64 {
    // Nothing may have no address; XXH3 accepts null with length 0.
    let hash = unsafe cxxhash_64(bytes.baseAddress, bytes.count, seed)
    return hash == 0 ? 1 : hash
  }

  /// XXH3-64 of an array, never 0.
  static func of(_ bytes: [UInt8], seed: UInt64) -> UInt64 {
    unsafe bytes.withUnsafeBytes { unsafe of($0, seed: seed) }
  }

  /// The same of what comes in parts.
  @safe
  struct Stream: ~Copyable {
    // SAFETY: made and freed here.
    private let state: OpaquePointer

    /// `nil` without memory.
    init?(seed: UInt64) {
      guard let state = unsafe cxxhash_stream(seed) else { return nil }
      unsafe self.state = state
    }

    deinit { unsafe cxxhash_free(state) }

    mutating func add(_ bytes: [UInt8]) {
      // SAFETY: the bytes are valid for the call.
      unsafe bytes.withUnsafeBytes { unsafe cxxhash_add(state, $0.baseAddress, $0.count) }
    }

    /// Of all bytes so far, never 0.
    var value: UInt64 {
      let hash = unsafe cxxhash_value(state)
      return hash == 0 ? 1 : hash
    }
  }

  /// The seed for things of one kind in one image; `number` tells them apart.
  static func key(_ id: ImageID, _ tag: Tag, number: Int = 0) -> UInt64 {
    let bytes = (id.low.littleEndian, id.high.littleEndian)
    let seed = tag.rawValue << 32 | UInt64(number)
    // SAFETY: the tuple is 16 bytes without padding and lives through the call.
    return unsafe withUnsafeBytes(of: bytes) { buffer in
      unsafe cxxhash_64(buffer.baseAddress, buffer.count, seed)
    }
  }

  /// The seed for the `position`-th of a sequence. Different for every position: the
  /// factor is odd.
  @inline(__always)
  static func seed(_ key: UInt64, position: Int) -> UInt64 {
    key &+ 0x9E37_79B9_7F4A_7C15 &* UInt64(truncatingIfNeeded: position)
  }
}

/// Whether a block holds only zeros.
///
/// SAFETY: the caller vouches for 4096 readable bytes at an address that is a multiple
/// of 8.
@inline(__always)
@unsafe func isZeroBlock(_ block: UnsafeRawPointer) -> Bool {
  let words = unsafe block.assumingMemoryBound(to: UInt64.self)
  var index = 0
  while index < ImageLimits.blockSize / 8 {
    // Eight words at a time: data usually shows in the first of them.
    let first = unsafe words[index] | words[index + 1] | words[index + 2] | words[index + 3]
    let second = unsafe words[index + 4] | words[index + 5] | words[index + 6] | words[index + 7]
    if first | second != 0 { return false }
    index += 8
  }
  return true
}
