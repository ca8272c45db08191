// SPDX-License-Identifier: Apache-2.0

internal import CCrypto

/// SHA-256 by libcrypto (EVP_DigestInit_ex(3)). One thread at a time.
@safe
final class SHA256Hasher: @unchecked Sendable {
  // SAFETY: whoever made it is its only user.
  private let context: OpaquePointer

  init?() {
    guard let context = unsafe EVP_MD_CTX_new() else { return nil }
    unsafe self.context = context
    guard unsafe EVP_DigestInit_ex(context, EVP_sha256(), nil) == 1 else { return nil }
  }

  deinit { unsafe EVP_MD_CTX_free(context) }

  /// Adds bytes.
  @unsafe func add(_ bytes: UnsafeRawBufferPointer) {
    // SAFETY: the caller vouches for the bytes.
    _ = unsafe EVP_DigestUpdate(context, bytes.baseAddress, bytes.count)
  }

  /// Adds bytes after their number.
  func addPart(_ bytes: [UInt8]) {
    addLength(bytes.count)
    unsafe bytes.withUnsafeBytes { unsafe add($0) }
  }

  /// Begins a part of so many bytes.
  func addLength(_ length: Int) {
    let word = UInt64(length).littleEndian
    unsafe withUnsafeBytes(of: word) { unsafe add($0) }
  }

  /// Writes the hash of what was added, 32 bytes, and begins anew.
  @unsafe func finish(into target: UnsafeMutableRawPointer) {
    // SAFETY: the caller has room for 32 bytes, which is what SHA-256 gives.
    _ = unsafe EVP_DigestFinal_ex(context, target.assumingMemoryBound(to: UInt8.self), nil)
    _ = unsafe EVP_DigestInit_ex(context, EVP_sha256(), nil)
  }

  /// The hash of what was added; begins anew.
  func finish() -> ContentID {
    var bytes = [UInt8](repeating: 0, count: ContentID.length)
    unsafe bytes.withUnsafeMutableBytes { buffer in
      if let start = buffer.baseAddress { unsafe finish(into: start) }
    }
    return ContentID(bytes: bytes)
  }
}
