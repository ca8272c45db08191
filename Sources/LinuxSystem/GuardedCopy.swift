// SPDX-License-Identifier: Apache-2.0

internal import CLinux
public import SystemPackage

/// Copies memory of this process that may turn out not to be readable, or not to be writable.
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

  /// Copies bytes through the kernel: where a store would raise SIGBUS or SIGSEGV, because the
  /// memory file that is mapped has no page there and gets none, it throws `badAddress`.
  ///
  /// What was copied before that stays.
  @unsafe
  public static func write(
    _ bytes: UnsafeRawBufferPointer, to address: HostAddress
  ) throws(Errno) {
    do {
      try unsafe write(bytes, to: address, by: .processVM)
    } catch .noFunction, .notPermitted {
      try unsafe write(bytes, to: address, by: .file)
    }
  }

  @unsafe
  package static func write(
    _ bytes: UnsafeRawBufferPointer, to address: HostAddress, by way: Way
  ) throws(Errno) {
    guard let start = bytes.baseAddress else { return }
    let copy =
      switch way {
      case .processVM: unsafe clinux_copy_to_own_memory
      case .file: unsafe clinux_copy_to_through_file
      }
    var done = 0
    while done < bytes.count {
      // SAFETY: the rest of the bytes is readable; the kernel checks the other side.
      let result = unsafe copy(
        UInt(address.rawValue) + UInt(done), start + done, bytes.count - done)
      if result == -Int(EINTR) { continue }
      guard try check(result) > 0 else { throw .badAddress }
      done += result
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
