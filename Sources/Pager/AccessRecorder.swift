// SPDX-License-Identifier: Apache-2.0

internal import LinuxSystem
internal import Synchronization
internal import SystemPackage

/// The order in which pages were first touched: addresses, in memory that is there from the
/// start. Several threads write; nothing is allocated.
@safe
final class AccessRecorder: @unchecked Sendable {
  // SAFETY: each slot is written by the one thread that got its number, and read when the
  // threads have ended or by somebody who can do with less.
  private let storage: Mapping
  private let slots: UnsafeMutablePointer<Atomic<UInt64>>
  private let capacity: Int
  private let count = Atomic<Int>(0)

  /// Room for so many pages.
  init(pages: Int) throws(Errno) {
    capacity = pages
    let storage = try Mapping(anonymous: (pages * 8 + 4095) & ~4095)
    // SAFETY: Atomic<UInt64> has the layout of UInt64; anonymous memory is zero.
    unsafe slots = storage.pointer.assumingMemoryBound(to: Atomic<UInt64>.self)
    self.storage = storage
  }

  /// Notes a page. One that is touched for the first time more often than there are pages,
  /// because its claim was given back, is left out at the end.
  func note(_ page: HostAddress) {
    let index = count.wrappingAdd(1, ordering: .relaxed).oldValue
    guard index < capacity else { return }
    unsafe slots[index].store(page.rawValue, ordering: .releasing)
  }

  /// What was noted so far, in order; an address can occur twice.
  func addresses() -> [HostAddress] {
    (0..<min(count.load(ordering: .relaxed), capacity)).compactMap { index in
      let address = unsafe slots[index].load(ordering: .acquiring)
      return address == 0 ? nil : HostAddress(address)
    }
  }
}
