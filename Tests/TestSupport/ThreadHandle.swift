// SPDX-License-Identifier: Apache-2.0

package import LinuxSystem
import Synchronization

/// A thread that a test can keep in an array and join once.
package final class ThreadHandle: Sendable {
  private let thread: Mutex<NamedThread?>

  package init(_ thread: consuming NamedThread) { self.thread = Mutex(thread) }

  /// Starts a thread of a test.
  package static func start(_ body: @escaping @Sendable () -> Void) throws -> ThreadHandle {
    ThreadHandle(try NamedThread(name: "test", body))
  }

  package func join() {
    let thread = self.thread.withLock { $0.take() }
    if let thread { thread.join() }
  }
}

/// Lets many threads begin at the same moment.
package final class ThreadGate: Sendable {
  private let isOpen = Atomic<Bool>(false)
  package init() {}
  package func open() { isOpen.store(true, ordering: .releasing) }
  package func wait() { while !isOpen.load(ordering: .acquiring) { Delay.microseconds(10) } }
}
