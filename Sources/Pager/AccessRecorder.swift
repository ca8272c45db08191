// SPDX-License-Identifier: Apache-2.0

internal import LinuxSystem
internal import Synchronization
internal import SystemPackage

/// The order in which pages were first touched: addresses, in memory that is there from the first
/// start on. Several threads write; no lock is taken and nothing is allocated.
@safe
final class AccessRecorder: @unchecked Sendable {
  // SAFETY: slots are written by the one thread that got their number, and read by somebody who can
  // do with less. Their memory, once there, stays as long as the recorder.
  private typealias Slots = UnsafeMutablePointer<Atomic<UInt64>>

  private final class Storage: Sendable {
    let mapping: Mapping
    init(slots: Int) throws(Errno) { mapping = try Mapping(anonymous: (slots * 8 + 4095) & ~4095) }
    // SAFETY: Atomic<UInt64> has the layout of UInt64; anonymous memory is zero.
    var slots: Slots { unsafe mapping.pointer.assumingMemoryBound(to: Atomic<UInt64>.self) }
  }

  private let capacity: Int
  private let storage = Mutex<Storage?>(nil)
  /// The storage's slots while it records, else `nil`: all that a fault looks at.
  private let current = unsafe Atomic<Slots?>(nil)
  private let count = Atomic<Int>(0)

  /// A recorder for so many pages, which takes no memory until it is started.
  init(pages: Int) { capacity = pages }

  /// Whether it records.
  var isRecording: Bool { unsafe current.load(ordering: .relaxed) != nil }

  /// Whether it does, or did.
  var hasRecorded: Bool { storage.withLock { $0 != nil } }

  /// Notes pages from here on, after those that it has.
  func start() throws(Errno) {
    // The lock keeps a stop from going between.
    try storage.withLock { (storage) throws(Errno) in
      let there = storage
      let slots = if let there { there } else { try Storage(slots: capacity) }
      storage = slots
      unsafe current.store(slots.slots, ordering: .releasing)
    }
  }

  /// Notes no more, but for a fault that is under way. What was noted stays.
  func stop() {
    storage.withLock { _ in unsafe current.store(nil, ordering: .relaxed) }
  }

  /// Notes a page, if it records. One that is touched for the first time more often than there
  /// are pages, because its claim was given back, is left out at the end.
  func note(_ page: HostAddress) {
    guard let slots = unsafe current.load(ordering: .acquiring) else { return }
    let index = count.wrappingAdd(1, ordering: .relaxed).oldValue
    guard index < capacity else { return }
    unsafe slots[index].store(page.rawValue, ordering: .releasing)
  }

  /// What was noted so far, in order; an address can occur twice.
  func addresses() -> [HostAddress] {
    guard let storage = storage.withLock({ $0 }) else { return [] }
    return (0..<min(count.load(ordering: .relaxed), capacity)).compactMap { index in
      let address = unsafe storage.slots[index].load(ordering: .acquiring)
      return address == 0 ? nil : HostAddress(address)
    }
  }
}
