// SPDX-License-Identifier: Apache-2.0

internal import CLinux
public import SystemPackage

/// Copies memory of this process that may turn out not to be readable.
public enum GuardedCopy {
  /// How the kernel is asked.
  package enum Way: CaseIterable {
    /// process_vm_readv(2). Kernels without CONFIG_CROSS_MEMORY_ATTACH refuse it with ENOSYS, and
    /// containers' seccomp filters with EPERM.
    case processVM
    /// write(2) to a file in memory, and back: half as fast. Not `/proc/self/mem`, which gives up
    /// at a page that a userfault has to bring (mm/memory.c, `__access_remote_vm`).
    case file
  }

  /// Copies bytes through the kernel: where a load would raise SIGBUS or SIGSEGV, because a page is
  /// poisoned or its file was cut, it stops.
  ///
  /// Half as fast as a plain copy. Pages that are absent are brought in as by a load.
  /// - Returns: how many bytes from the first on were copied.
  @unsafe
  public static func read(
    from address: HostAddress, into buffer: UnsafeMutableRawBufferPointer
  ) throws(Errno) -> Int {
    do {
      return try unsafe read(from: address, into: buffer, by: .processVM)
    } catch .noFunction, .notPermitted {
      return try unsafe read(from: address, into: buffer, by: .file)
    }
  }

  @unsafe
  package static func read(
    from address: HostAddress, into buffer: UnsafeMutableRawBufferPointer, by way: Way
  ) throws(Errno) -> Int {
    guard let start = buffer.baseAddress, buffer.count > 0 else { return 0 }
    let copy =
      switch way {
      case .processVM: unsafe clinux_copy_own_memory
      case .file: unsafe clinux_copy_through_file
      }
    var done = 0
    while done < buffer.count {
      // SAFETY: the rest of the buffer is writable; the kernel checks the other side.
      let result = unsafe copy(
        start + done, UInt(address.rawValue) + UInt(done), buffer.count - done)
      if result == -Int(EINTR) { continue }
      if result == -Int(EFAULT) || result == 0 { return done }
      done += try check(result)
    }
    return done
  }
}
