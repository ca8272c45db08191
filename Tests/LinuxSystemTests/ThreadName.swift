// SPDX-License-Identifier: Apache-2.0

import Foundation
import Synchronization

/// What the kernel calls this thread.
func currentThreadName() -> String {
  let text = try? String(contentsOfFile: "/proc/thread-self/comm", encoding: .utf8)
  return (text ?? "").trimmingCharacters(in: .whitespacesAndNewlines)
}

/// A string that threads hand over.
final class NameBox: Sendable {
  private let value = Mutex("")
  func set(_ name: String) { value.withLock { $0 = name } }
  func get() -> String { value.withLock { $0 } }
}
