// SPDX-License-Identifier: Apache-2.0

internal import CLinux
public import SystemPackage

extension OwnedDescriptor {
  /// Writes all bytes at an offset (pwrite(2)), in as many calls as it takes.
  ///
  /// After an error any part of the range may have been written.
  @unsafe
  public borrowing func writeAll(_ bytes: UnsafeRawBufferPointer, at offset: Int) throws(Errno) {
    var done = 0
    while done < bytes.count {
      let rest = unsafe UnsafeRawBufferPointer(rebasing: bytes[done...])
      let written = unsafe clinux_pwrite(
        rawValue, rest.baseAddress, rest.count, off_t(offset + done))
      if written == -Int(EINTR) { continue }
      // A write that makes no progress without an error would loop for ever.
      guard try check(written) > 0 else { throw .ioError }
      done += written
    }
  }

  /// Writes all bytes of an array at an offset.
  public borrowing func writeAll(_ bytes: [UInt8], at offset: Int) throws(Errno) {
    let result = unsafe bytes.withUnsafeBytes { buffer in
      Result { () throws(Errno) in
        // SAFETY: the buffer is valid for the closure.
        try unsafe writeAll(buffer, at: offset)
      }
    }
    try result.get()
  }

  /// Writes at an offset, once (pwrite(2)); returns how many bytes were written.
  @unsafe
  public borrowing func write(
    _ bytes: UnsafeRawBufferPointer, at offset: Int
  ) throws(Errno) -> Int {
    try check(unsafe clinux_pwrite(rawValue, bytes.baseAddress, bytes.count, off_t(offset)))
  }

  /// Reads exactly as many bytes as there is room for (pread(2)); fewer in the file is
  /// `noData`.
  ///
  /// - Parameter waits: `false` for `wouldBlock` in place of waiting for storage; see `read`.
  @unsafe
  public borrowing func readAll(
    into bytes: UnsafeMutableRawBufferPointer, at offset: Int, waits: Bool = true
  ) throws(Errno) {
    var done = 0
    while done < bytes.count {
      // SAFETY: the rest of the caller's buffer.
      let rest = unsafe UnsafeMutableRawBufferPointer(rebasing: bytes[done...])
      let count = try unsafe read(into: rest, at: offset + done, waits: waits)
      guard count > 0 else { throw .noData }
      done += count
    }
  }

  /// Makes sure that the blocks of a range exist, as zeros where they did not
  /// (fallocate(2)): `noSpace` now instead of SIGBUS at a later touch.
  ///
  /// - Parameter keepsSize: FALLOC_FL_KEEP_SIZE, which guest_memfd insists on.
  public borrowing func allocate(
    offset: Int, length: Int, keepsSize: Bool = false
  ) throws(Errno) {
    let mode: CInt = keepsSize ? 1 : 0
    while true {
      let result = clinux_fallocate(rawValue, mode, off_t(offset), off_t(length))
      if result != -Int(EINTR) {
        _ = try check(result)
        return
      }
    }
  }

  /// Frees the blocks of a range, which reads as zero then; its length stays (fallocate(2),
  /// FALLOC_FL_PUNCH_HOLE). No userfaultfd event is raised (unlike MADV_REMOVE).
  public borrowing func punchHole(offset: Int, length: Int) throws(Errno) {
    let mode = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
    _ = try retryingInterrupted {
      clinux_fallocate(rawValue, mode, off_t(offset), off_t(length))
    }
  }
}
