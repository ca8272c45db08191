// SPDX-License-Identifier: Apache-2.0

import CTestSupport
package import LinuxSystem

/// Children of this process that read its memory when they are told to.
@safe
package final class ForkedReaders {
  private let go: UnsafeMutablePointer<CInt>
  private var processes: [CInt] = []

  package init?() {
    guard let word = unsafe ctest_shared_word() else { return nil }
    unsafe go = UnsafeMutablePointer(mutating: word)
  }

  /// Forks one.
  ///
  /// - Parameter depth: it is a child of a child of that many.
  package func fork(_ range: HostRange, depth: Int) {
    // SAFETY: the word stays mapped.
    processes.append(
      unsafe ctest_fork_reader(
        UInt(range.start.rawValue), range.length / 4096, go, CInt(depth)))
  }

  /// Has them read.
  ///
  /// - Returns: pages that were zero and should not be, and children that did not come to the end.
  package func read() -> (zeros: Int, lost: Int) {
    // SAFETY: as above; it is one word.
    unsafe go.pointee = 1
    let codes = processes.map { Int(ctest_wait($0)) }
    return (codes.reduce(0) { $0 + max($1, 0) }, codes.count { $0 < 0 || $0 == 255 })
  }
}
