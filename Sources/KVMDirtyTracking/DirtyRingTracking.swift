// SPDX-License-Identifier: Apache-2.0

public import GuestMemory
internal import KVM
internal import Synchronization
internal import SystemPackage

/// Tracks the writes of vCPUs with KVM's dirty rings (api.rst, section 8.29).
///
/// Each write to a protected page makes an entry in the ring of the vCPU, so collecting
/// costs what was written and not what there is. A vCPU whose ring is full comes back to its
/// owner, who drains the rings.
///
/// Exact to 4 KiB, also on huge pages. It does not see what the host writes: this process,
/// system calls, UFFDIO_COPY.
public final class DirtyRingTracking: DirtyTracking {
  private struct State {
    var slots: [TrackedSlot] = []
    /// Slots that log.
    var logging: Set<UInt32> = []
    var isRunning = false
  }

  private let machine: any DirtyLoggingMachine
  private let rings: DirtyRings
  /// Taken before the lock of the rings.
  private let state = Mutex(State())

  /// A tracker of a machine's memory; does nothing yet. One at a time may be prepared.
  public init(_ machine: any DirtyLoggingMachine, _ rings: DirtyRings) {
    self.machine = machine
    self.rings = rings
  }

  deinit { stop() }

  /// `.ring`.
  public var method: DirtyTrackingMethod { .ring }

  /// 4 KiB pages of guest memory.
  public var pageCount: Int { machine.trackedPageCount }

  /// Makes room for what the rings will hold.
  public func prepare() throws(DirtyTrackingError) {
    try state.withLock { state throws(DirtyTrackingError) in
      let slots = try machine.trackedSlots()
      try rings.state.withLock { rings throws(DirtyTrackingError) in
        guard !state.isRunning, rings.slots.isEmpty else { throw .alreadyStarted }
        rings.slots = slots
        rings.armed = DirtyBitmap(pageCount: pageCount)
        rings.pending = DirtyBitmap(pageCount: pageCount)
      }
      state.slots = slots
      state.isRunning = true
    }
  }

  /// Turns the log of the slots on that have some of the pages. KVM protects a whole slot at
  /// once: the first arming of a slot costs what its size is.
  public func arm(_ pages: Range<Int>) throws(DirtyTrackingError) {
    try state.withLock { state throws(DirtyTrackingError) in
      guard state.isRunning else { throw .notStarted }
      guard pages.lowerBound >= 0, pages.upperBound <= pageCount else {
        throw DirtyTrackingError(
          .invalidArgument, "Pages \(pages) are not among the \(pageCount) that are tracked")
      }
      for slot in state.slots
      where slot.pages.overlaps(pages) && !state.logging.contains(slot.number) {
        do throws(Errno) {
          try machine.setLogging(true, of: slot)
        } catch {
          throw DirtyTrackingError(logging: slot, error)
        }
        state.logging.insert(slot.number)
      }
      try withRings { rings, machine, state throws(Errno) in
        // What lies in the rings by now does not count for pages that are armed here.
        try rings.harvest(machine, &state)
        state.armed.insert(pages)
      }
    }
  }

  /// Takes what the rings have, and has KVM protect those pages again.
  public func collect(into bitmap: inout DirtyBitmap) throws(DirtyTrackingError) {
    try bitmap.requirePageCount(pageCount)
    try state.withLock { state throws(DirtyTrackingError) in
      guard state.isRunning else { throw .notStarted }
      try withRings { rings, machine, state throws(Errno) in
        try rings.harvest(machine, &state)
        bitmap.formUnion(state.pending)
        state.pending.removeAll()
      }
    }
  }

  private func withRings(
    _ body: (DirtyRings, borrowing VirtualMachine, inout DirtyRings.State) throws(Errno) -> Void
  ) throws(DirtyTrackingError) {
    do throws(Errno) {
      try machine.withMachine { machine throws(Errno) in
        try rings.state.withLock { state throws(Errno) in try body(rings, machine, &state) }
      }
    } catch {
      throw DirtyTrackingError("Resetting the dirty rings", error)
    }
  }

  /// Turns the log of the slots off and empties the rings.
  public func stop() {
    state.withLock { state in
      guard state.isRunning else { return }
      // These fail only for a machine that has ended.
      for slot in state.slots where state.logging.contains(slot.number) {
        try? machine.setLogging(false, of: slot)
      }
      try? withRings { rings, machine, state throws(Errno) in try rings.harvest(machine, &state) }
      rings.state.withLock { $0 = DirtyRings.State(outstanding: $0.outstanding) }
      state = State()
    }
  }
}
