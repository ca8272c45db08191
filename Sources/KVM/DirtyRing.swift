// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import LinuxSystem
public import SystemPackage

/// A page that a vCPU wrote to.
public struct DirtyPage: Hashable, Sendable {
  /// The memory slot, with the address space in the upper 16 bits.
  public let slot: UInt32
  /// The page's number within the slot, in units of 4 KiB.
  public let page: UInt64
}

/// The dirty ring of one vCPU (api.rst, section 8.29), read by one thread at a time.
///
/// A page's entry is written after the page; a full ring makes the vCPU exit with
/// `dirtyRingFull`, to be harvested and reset.
@safe
public struct DirtyRing: ~Copyable, @unchecked Sendable {
  // SAFETY: `Sendable` because harvesting is mutating, hence exclusive, and the kernel's
  // side is synchronised by the entries' flags (acquire here, release there).
  private let mapping: Mapping
  private let entries: Int
  private var next: UInt32 = 0

  /// Maps the ring of a vCPU that was made after `enableDirtyRings(entries:)`.
  ///
  /// - Parameter entries: the same number as there.
  public init(of vcpu: borrowing VCPU, entries: Int) throws(Errno) {
    guard entries > 0, entries.nonzeroBitCount == 1 else { throw .invalidArgument }
    mapping = try Mapping(
      of: vcpu.descriptor, offset: Int(KVM_DIRTY_LOG_PAGE_OFFSET) * 4096,
      length: entries * MemoryLayout<kvm_dirty_gfn>.size, sharing: .shared)
    self.entries = entries
  }

  /// Takes all entries that are there. Returns how many; the kernel gets them back with
  /// `VirtualMachine.resetDirtyRings()`.
  public mutating func harvest(_ body: (DirtyPage) -> Void) -> Int {
    var count = 0
    while count < entries {
      // SAFETY: the index is taken modulo the number of entries that are mapped.
      let base = unsafe mapping.pointer.assumingMemoryBound(to: kvm_dirty_gfn.self)
      let entry = unsafe base + Int(next & UInt32(entries - 1))
      guard unsafe clinux_kvm_dirty_gfn_is_dirty(entry) else { break }
      body(unsafe DirtyPage(slot: entry.pointee.slot, page: entry.pointee.offset))
      unsafe clinux_kvm_dirty_gfn_reset(entry)
      next &+= 1
      count += 1
    }
    return count
  }
}
