// SPDX-License-Identifier: Apache-2.0

internal import CGuestProgram
package import LinuxSystem

/// Access to memory of this process that may raise SIGBUS or SIGSEGV.
package enum GuardedMemory {
  /// Reads the 8 bytes at an address (a multiple of 8), and with `writing` writes the
  /// same bytes back in one atomic step. `nil` when the access raised a signal: the page
  /// is poisoned, beyond its object's end, or not mapped.
  ///
  /// Any thread may call this. The memory may be under userfaultfd; then somebody else
  /// has to serve it.
  package static func touch(_ address: HostAddress, writing: Bool = false) -> UInt64? {
    precondition(address.rawValue % 8 == 0)
    var value: UInt64 = 0
    // SAFETY: the access is guarded; a wrong address gives `nil`.
    let fault = unsafe cguest_guarded_touch(address.rawValue, writing ? 1 : 0, &value)
    return fault.happened == 0 ? value : nil
  }

  /// Copies bytes out of guest memory; `false` after a signal.
  @unsafe
  static func read(_ source: UnsafeRawPointer, into target: UnsafeMutableRawBufferPointer) -> Bool {
    unsafe cguest_guarded_copy(target.baseAddress, source, target.count).happened == 0
  }

  /// Copies bytes into guest memory; `false` after a signal.
  @unsafe
  static func write(_ source: UnsafeRawBufferPointer, to target: UnsafeMutableRawPointer) -> Bool {
    unsafe cguest_guarded_copy(target, source.baseAddress, source.count).happened == 0
  }
}
