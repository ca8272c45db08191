// SPDX-License-Identifier: Apache-2.0

internal import CZstd

/// A compression context of libzstd. One thread at a time.
@safe
final class ZstdCompressor: @unchecked Sendable {
  // SAFETY: whoever takes it out of a pool is its only user until it goes back.
  private let context: OpaquePointer

  /// Frames with their content size, without a checksum: the chunk table has one.
  init?(level: Int) {
    guard let context = unsafe ZSTD_createCCtx() else { return nil }
    unsafe self.context = context
    unsafe ZSTD_CCtx_setParameter(context, ZSTD_c_compressionLevel, CInt(level))
    unsafe ZSTD_CCtx_setParameter(context, ZSTD_c_contentSizeFlag, 1)
    guard level == 1 else { return }
    // What libzstd takes for level 1 is meant for long content. With little of it these find
    // 2 % more and are no slower (DESIGN.md, decision 14).
    unsafe ZSTD_CCtx_setParameter(context, ZSTD_c_minMatch, 5)
    unsafe ZSTD_CCtx_setParameter(context, ZSTD_c_hashLog, 15)
  }

  deinit { unsafe ZSTD_freeCCtx(context) }

  /// Bytes of room that any content of that length needs.
  static func bound(_ length: Int) -> Int { ZSTD_compressBound(length) }

  /// Compresses into `target`; the bytes used, or `nil` where they do not fit.
  @unsafe func compress(
    _ content: UnsafeRawBufferPointer, into target: UnsafeMutableRawBufferPointer
  ) -> Int? {
    // SAFETY: both buffers are the caller's for the time of the call.
    let result = unsafe ZSTD_compress2(
      context, target.baseAddress, target.count, content.baseAddress, content.count)
    return ZSTD_isError(result) == 0 ? result : nil
  }
}

/// A decompression context of libzstd. One thread at a time.
@safe
final class ZstdDecompressor: @unchecked Sendable {
  // SAFETY: as for `ZstdCompressor`.
  private let context: OpaquePointer

  init?() {
    guard let context = unsafe ZSTD_createDCtx() else { return nil }
    unsafe self.context = context
  }

  deinit { unsafe ZSTD_freeDCtx(context) }

  /// The content of one frame, if it is exactly as long as `target`. Never writes more,
  /// whatever the frame says.
  @unsafe func decompress(
    _ frame: UnsafeRawBufferPointer, into target: UnsafeMutableRawBufferPointer
  ) -> Bool {
    // SAFETY: both buffers are the caller's for the time of the call.
    let result = unsafe ZSTD_decompressDCtx(
      context, target.baseAddress, target.count, frame.baseAddress, frame.count)
    return ZSTD_isError(result) == 0 && result == target.count
  }

  /// The content's length that a frame claims; `nil` when it is no frame that says it.
  @unsafe static func contentLength(_ frame: UnsafeRawBufferPointer) -> Int? {
    let length = unsafe ZSTD_getFrameContentSize(frame.baseAddress, frame.count)
    return Int(exactly: length)
  }
}
