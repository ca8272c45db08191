// SPDX-License-Identifier: Apache-2.0

internal import Userfault

/// Faults that were read and wait to be resolved: first in, first out, of fixed size.
@safe
struct FaultQueue: ~Copyable {
  /// A fault and when it was read.
  struct Entry {
    var fault: PageFault
    var received: UInt64
  }

  private let slots: UnsafeMutableBufferPointer<Entry>
  private var head = 0
  private(set) var count = 0

  init(capacity: Int) { unsafe slots = .allocate(capacity: capacity) }
  deinit { unsafe slots.deallocate() }

  var room: Int { unsafe slots.count - count }

  /// The caller has looked whether there is room; without any the entry is left out.
  mutating func append(_ entry: Entry) {
    guard room > 0 else { return assertionFailure("a fault queue was not looked at before") }
    unsafe slots[(head + count) % slots.count] = entry
    count += 1
  }

  mutating func popFirst() -> Entry? {
    guard count > 0 else { return nil }
    // SAFETY: slots from head on, `count` of them, were stored by `append`.
    let entry = unsafe slots[head]
    unsafe head = (head + 1) % slots.count
    count -= 1
    return entry
  }
}
