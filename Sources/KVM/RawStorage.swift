// SPDX-License-Identifier: Apache-2.0

/// Zeroed memory for a kernel structure that ends in an array of variable length.
@safe
struct RawStorage: ~Copyable {
  // SAFETY: owned here alone and freed in deinit; callers stay within `byteCount`.
  @unsafe let bytes: UnsafeMutableRawPointer
  let byteCount: Int

  init(byteCount: Int) {
    self.byteCount = byteCount
    // 64 is enough for any of the kernel's structures, XSAVE's included.
    unsafe bytes = .allocate(byteCount: byteCount, alignment: 64)
    unsafe bytes.initializeMemory(as: UInt8.self, repeating: 0, count: byteCount)
  }

  deinit { unsafe bytes.deallocate() }

  /// A copy of the first `count` bytes.
  func copy(_ count: Int) -> [UInt8] {
    unsafe Array(UnsafeRawBufferPointer(start: bytes, count: min(count, byteCount)))
  }

  /// Overwrites the start.
  func fill(from source: [UInt8]) {
    unsafe UnsafeMutableRawBufferPointer(start: bytes, count: byteCount)
      .copyBytes(from: source.prefix(byteCount))
  }
}
