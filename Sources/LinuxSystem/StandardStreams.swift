// SPDX-License-Identifier: Apache-2.0

internal import CLinux
public import SystemPackage

/// The three descriptors that a program starts with, and the C library's standard output.
public enum StandardStreams {
  /// Puts something that fails in the place of each of the three that is closed. Else the next
  /// file that is opened would have its number, and what is printed would go into that file.
  public static func occupy() {
    // The other way round than it is used, but for standard error: notes go nowhere then.
    for (number, flags) in [(CInt(0), O_WRONLY), (1, O_RDONLY), (2, O_WRONLY)]
    where clinux_status_flags(number) == -Int(EBADF) {
      let opened = unsafe clinux_openat(AT_FDCWD, "/dev/null", flags, 0)
      guard opened >= 0, opened != Int(number) else { continue }
      _ = clinux_dup2(CInt(opened), number)
      _ = clinux_close(CInt(opened))
    }
  }

  /// Writes out what was printed. Throws what the kernel says, and `ioError` when a part that was
  /// printed before could not be written.
  public static func flushOutput() throws(Errno) { _ = try check(clinux_flush_output()) }
}
