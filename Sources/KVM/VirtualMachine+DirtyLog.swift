// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import LinuxSystem
public import SystemPackage

/// Flags of KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 (api.rst, section 7.18).
public struct ManualDirtyLogProtect: OptionSet, Hashable, Sendable {
  /// The bits.
  public let rawValue: UInt64
  /// Any bits, also unknown ones.
  public init(rawValue: UInt64) { self.rawValue = rawValue }
  /// KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE: reading the log leaves pages writable; clearing
  /// is a call of its own.
  public static let enable = Self(rawValue: 1 << 0)
  /// KVM_DIRTY_LOG_INITIALLY_SET: every page counts as dirty at first, which saves the
  /// write protection of a whole slot at once (Linux 5.7).
  public static let initiallySet = Self(rawValue: 1 << 1)
}

/// A bit for each 4 KiB page of a slot.
public struct DirtyLog: Hashable, Sendable {
  /// Pages of the slot.
  public let pageCount: Int
  /// Bit n of word m is page 64 m + n.
  public internal(set) var words: [UInt64]

  /// No page is set.
  public init(pageCount: Int) {
    precondition(pageCount >= 0)
    self.pageCount = pageCount
    words = Array(repeating: 0, count: (pageCount + 63) / 64)
  }

  /// Whether a page is set.
  public subscript(page: Int) -> Bool { words[page >> 6] & (1 << UInt64(page & 63)) != 0 }

  /// How many are set.
  public var dirtyCount: Int { words.reduce(0) { $0 + $1.nonzeroBitCount } }

  /// The pages that are set, in order.
  public var dirtyPages: [Int] { (0..<pageCount).filter { self[$0] } }
}

extension VirtualMachine {
  /// Makes reading and clearing the dirty log two steps. Before slots are logged.
  public borrowing func enableManualDirtyLogProtect(
    _ flags: ManualDirtyLogProtect
  ) throws(Errno) {
    try enable(.manualDirtyLogProtect, flags.rawValue)
  }

  /// The pages that the guest wrote since the log was cleared; without manual protection
  /// this clears it (KVM_GET_DIRTY_LOG).
  ///
  /// Writes of the host and userfaultfd's are not in it. `noSuchFileOrDirectory` when
  /// the slot does not log, `noSuchAddressOrDevice` when dirty rings are on.
  /// - Parameter pageCount: the slot's 4 KiB pages; too few would let the kernel write
  ///   beyond the bitmap.
  @unsafe
  public borrowing func dirtyLog(slot: UInt32, pageCount: Int) throws(Errno) -> DirtyLog {
    var bitmap = DirtyLog(pageCount: pageCount)
    let number = descriptor.rawValue
    // SAFETY: the bitmap has a bit for each page of the slot (the caller's promise),
    // rounded up to 64 as the kernel does.
    let result = unsafe bitmap.words.withUnsafeMutableBytes { words in
      var request = unsafe kvm_dirty_log()
      unsafe request.slot = slot
      unsafe request.dirty_bitmap = words.baseAddress
      return unsafe clinux_kvm_get_dirty_log(number, &request)
    }
    _ = try check(result)
    return bitmap
  }

  /// Forgets the pages that are set in `bitmap` and watches them again
  /// (KVM_CLEAR_DIRTY_LOG). Needs manual protection.
  public borrowing func clearDirtyLog(slot: UInt32, _ bitmap: DirtyLog) throws(Errno) {
    try clearDirtyLog(slot: slot, words: bitmap.words, pages: 0..<bitmap.pageCount)
  }

  /// The same for part of a slot.
  ///
  /// - Parameters:
  ///   - words: bit n of word m is page 64 m + n behind the first one; pages whose bit is 0
  ///     stay as they are.
  ///   - pages: the first is a multiple of 64, the end too unless it is the slot's.
  public borrowing func clearDirtyLog(
    slot: UInt32, words: [UInt64], pages: Range<Int>
  ) throws(Errno) {
    guard words.count >= (pages.count + 63) / 64 else { throw .invalidArgument }
    var words = words
    let number = descriptor.rawValue
    // SAFETY: the kernel reads `num_pages` bits, which `words` has.
    let result = unsafe words.withUnsafeMutableBytes { words in
      var request = unsafe kvm_clear_dirty_log()
      unsafe request.slot = slot
      unsafe request.num_pages = UInt32(pages.count)
      unsafe request.first_page = UInt64(pages.lowerBound)
      unsafe request.dirty_bitmap = words.baseAddress
      return unsafe clinux_kvm_clear_dirty_log(number, &request)
    }
    _ = try check(result)
  }

  // MARK: - Dirty rings

  /// Gives every vCPU that is made from now on a ring of dirty pages instead of the
  /// slots' bitmaps (api.rst, section 8.29).
  ///
  /// - Parameter entries: a power of two, at most `KVMCapabilities.dirtyRingEntries`.
  public borrowing func enableDirtyRings(entries: Int) throws(Errno) {
    let bytes = UInt64(entries * MemoryLayout<kvm_dirty_gfn>.size)
    let weak = try value(of: .dirtyRingAcquireRelease) > 0
    try enable(weak ? .dirtyRingAcquireRelease : .dirtyRing, bytes)
  }

  /// Hands the entries that were harvested back and watches their pages again
  /// (KVM_RESET_DIRTY_RINGS). Returns how many it handed back.
  ///
  /// Since Linux 6.16 these can be fewer than were harvested, even none: a signal that waits for
  /// the calling thread ends the reset without an error (virt/kvm/dirty_ring.c). The pages of
  /// the others are not watched until another call has handed them back.
  @discardableResult
  public borrowing func resetDirtyRings() throws(Errno) -> Int {
    try check(clinux_kvm_reset_dirty_rings(descriptor.rawValue, 0))
  }
}
