// SPDX-License-Identifier: Apache-2.0

internal import CLinux
public import SystemPackage

/// Turns what a `CLinux` function returned into a value or an `Errno`.
///
/// The C shims return the negated errno, so nothing can run between the call and
/// its error.
@inlinable
package func check(_ result: Int) throws(Errno) -> Int {
  guard result >= 0 else { throw Errno(rawValue: CInt(-result)) }
  return result
}

/// Repeats a call that a signal interrupted before it did anything (signal(7)).
///
/// Never use it around `close(2)` (the descriptor is gone also after EINTR) or
/// `KVM_RUN` (there EINTR is the answer).
@inlinable
package func retryingInterrupted(_ call: () -> Int) throws(Errno) -> Int {
  while true {
    let result = call()
    if result != -Int(Errno.interrupted.rawValue) { return try check(result) }
  }
}
