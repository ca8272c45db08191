// SPDX-License-Identifier: Apache-2.0

internal import LinuxSystem
internal import Synchronization

/// A thread that several may hold and one joins.
final class ThreadBox: Sendable {
  private let thread: Mutex<NamedThread?>
  init(_ thread: consuming NamedThread) { self.thread = Mutex(thread) }

  /// Waits for its end, the first time.
  func join() {
    let thread = self.thread.withLock { $0.take() }
    if let thread { thread.join() }
  }
}
