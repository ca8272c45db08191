// SPDX-License-Identifier: Apache-2.0

public import GuestMemory
internal import KVM
internal import Synchronization
internal import SystemPackage

/// Tracks the writes of vCPUs with KVM's dirty log and manual protection (api.rst,
/// KVM_GET_DIRTY_LOG, KVM_CLEAR_DIRTY_LOG and section 7.18).
///
/// Exact to 4 KiB, also on huge pages. It does not see what the host writes: this process,
/// system calls, UFFDIO_COPY.
///
/// With KVM_DIRTY_LOG_INITIALLY_SET (Linux 5.7) `prepare` protects nothing and `arm` is what
/// costs; without it `prepare` protects all memory at once.
public final class DirtyLogTracking: DirtyTracking {
  private struct State {
    var slots: [TrackedSlot] = []
    /// Pages whose writes count. KVM's bits of the others stay set.
    var armed: DirtyBitmap
    var isRunning = false
  }

  /// Pages that are cleared in one call, during which vCPUs wait for KVM's locks: 64 MiB.
  private static let piecePages = 16_384

  private let machine: any DirtyLoggingMachine
  private let state: Mutex<State>

  /// A tracker of a machine's memory; does nothing yet. Throws `.unavailable` where KVM
  /// has no manual protection.
  ///
  /// The machine must not have dirty rings: those replace the log.
  public init(_ machine: any DirtyLoggingMachine) throws(DirtyTrackingError) {
    if let reason = DirtyTrackingMethod.log.kvmUnavailability() {
      throw DirtyTrackingError(.unavailable, reason)
    }
    self.machine = machine
    state = Mutex(State(armed: DirtyBitmap(pageCount: machine.trackedPageCount)))
  }

  deinit { stop() }

  /// `.log`.
  public var method: DirtyTrackingMethod { .log }

  /// 4 KiB pages of guest memory.
  public var pageCount: Int { machine.trackedPageCount }

  /// Turns the log of all slots on.
  public func prepare() throws(DirtyTrackingError) {
    try state.withLock { state throws(DirtyTrackingError) in
      guard !state.isRunning else { throw .alreadyStarted }
      let slots = try machine.trackedSlots()
      do throws(Errno) {
        try machine.withMachine { machine throws(Errno) in
          let flags = try machine.value(of: .manualDirtyLogProtect)
          try machine.enableManualDirtyLogProtect(
            ManualDirtyLogProtect(rawValue: UInt64(flags))
              .intersection([.enable, .initiallySet]))
        }
      } catch {
        throw DirtyTrackingError("Enabling manual protection of the dirty log", error)
      }
      for (index, slot) in slots.enumerated() {
        do throws(Errno) {
          try machine.setLogging(true, of: slot)
        } catch {
          for slot in slots[..<index] { try? machine.setLogging(false, of: slot) }
          throw DirtyTrackingError(logging: slot, error)
        }
      }
      state.slots = slots
      state.isRunning = true
    }
  }

  /// Clears the log of pages that are not armed yet, which write-protects what vCPUs have
  /// mapped of them.
  public func arm(_ pages: Range<Int>) throws(DirtyTrackingError) {
    try state.withLock { state throws(DirtyTrackingError) in
      guard state.isRunning else { throw .notStarted }
      guard pages.lowerBound >= 0, pages.upperBound <= pageCount else {
        throw DirtyTrackingError(
          .invalidArgument, "Pages \(pages) are not among the \(pageCount) that are tracked")
      }
      for slot in state.slots where slot.pages.overlaps(pages) {
        var fresh = DirtyBitmap(pageCount: slot.pages.count)
        let part = slot.pages.clamped(to: pages)
        let first = slot.pages.lowerBound
        fresh.insert(part.lowerBound - first..<part.upperBound - first)
        let words = fresh.words.enumerated().map { index, word in
          word & ~state.armed.word(at: first + index * 64)
        }
        try clear(words, slot)
      }
      // From the clearing on KVM notes writes; those before do not count.
      state.armed.insert(pages)
    }
  }

  /// Reads the log, then clears what was read. A write between the two is to a page that is
  /// reported.
  public func collect(into bitmap: inout DirtyBitmap) throws(DirtyTrackingError) {
    try bitmap.requirePageCount(pageCount)
    try state.withLock { state throws(DirtyTrackingError) in
      guard state.isRunning else { throw .notStarted }
      for slot in state.slots {
        let first = slot.pages.lowerBound
        var words: [UInt64]
        do throws(Errno) {
          words = try machine.withMachine { machine throws(Errno) in
            // SAFETY: the slot has that many pages, its owner says.
            unsafe try machine.dirtyLog(slot: slot.number, pageCount: slot.pages.count).words
          }
        } catch {
          throw DirtyTrackingError("Reading the dirty log of slot \(slot.number)", error)
        }
        for index in words.indices where words[index] != 0 {
          words[index] &= state.armed.word(at: first + index * 64)
          // Before the clearing, after which only the bitmap knows.
          bitmap.insert(word: words[index], at: first + index * 64)
        }
        try clear(words, slot)
      }
    }
  }

  /// Clears the log of those pages of a slot whose bits are set.
  private func clear(_ words: [UInt64], _ slot: TrackedSlot) throws(DirtyTrackingError) {
    var first = 0
    while first < slot.pages.count {
      let piece = first..<min(first + Self.piecePages, slot.pages.count)
      let part = words[first / 64..<(piece.upperBound + 63) / 64]
      if part.contains(where: { $0 != 0 }) {
        do throws(Errno) {
          try machine.withMachine { machine throws(Errno) in
            try machine.clearDirtyLog(slot: slot.number, words: Array(part), pages: piece)
          }
        } catch {
          throw DirtyTrackingError("Clearing the dirty log of slot \(slot.number)", error)
        }
      }
      first = piece.upperBound
    }
  }

  /// Turns the log of all slots off.
  public func stop() {
    state.withLock { state in
      guard state.isRunning else { return }
      // Fails only for a machine that has ended.
      for slot in state.slots { try? machine.setLogging(false, of: slot) }
      state = State(armed: DirtyBitmap(pageCount: pageCount))
    }
  }
}
