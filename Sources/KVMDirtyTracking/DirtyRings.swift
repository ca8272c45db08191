// SPDX-License-Identifier: Apache-2.0

internal import GuestMemory
public import KVM
internal import Synchronization
public import SystemPackage

/// The dirty rings of all vCPUs of a machine, and what was harvested from them.
///
/// Belongs to the machine and not to a tracker: a ring has no beginning to return to, so
/// whoever reads it has to go on where the last one stopped.
///
/// The machine's owner calls `VirtualMachine.enableDirtyRings(entries:)` before the first
/// vCPU, makes this after the last one, and calls `drain` when a vCPU comes back with
/// `dirtyRingFull`.
public final class DirtyRings: Sendable {
  struct State {
    /// The pages of guest memory; empty while nobody tracks.
    var slots: [TrackedSlot] = []
    /// Pages whose writes count.
    var armed = DirtyBitmap(pageCount: 0)
    /// Harvested, of those that are armed, and not collected.
    var pending = DirtyBitmap(pageCount: 0)
    /// Entries that were harvested and that KVM has not taken back.
    var outstanding = 0
  }

  private final class Ring: Sendable {
    let ring: Mutex<DirtyRing>
    init(_ ring: consuming DirtyRing) { self.ring = Mutex(ring) }
  }

  private let rings: [Ring]
  /// Also held for harvesting and resetting: a page whose entry was taken is noted before
  /// anybody else can look at what is pending.
  let state = Mutex(State())

  /// How many entries each ring has.
  public let entries: Int

  /// Maps the rings of all vCPUs of a machine.
  public init(
    vcpuCount: Int, entries: Int, map: (_ index: Int) throws(Errno) -> DirtyRing
  ) throws(Errno) {
    var rings: [Ring] = []
    for index in 0..<vcpuCount { rings.append(Ring(try map(index))) }
    self.rings = rings
    self.entries = entries
  }

  /// Takes what all rings have, and lets KVM use the entries again. From any thread; a vCPU
  /// that came back because its ring was full can run afterwards.
  public func drain(_ machine: borrowing VirtualMachine) throws(Errno) {
    try state.withLock { state throws(Errno) in try harvest(machine, &state) }
  }

  func harvest(
    _ machine: borrowing VirtualMachine, _ state: inout State
  ) throws(Errno) {
    for box in rings {
      state.outstanding += box.ring.withLock { ring in ring.harvest { note($0, &state) } }
    }
    // Only now are the pages protected again: a write until then is to a page that is noted. A
    // signal to this thread ends a reset early, and the next one goes on from there.
    while state.outstanding > 0 { state.outstanding -= try machine.resetDirtyRings() }
  }

  private func note(_ page: DirtyPage, _ state: inout State) {
    guard let slot = state.slots.first(where: { $0.number == page.slot }),
      page.page < UInt64(slot.pages.count)
    else { return }
    let number = slot.pages.lowerBound + Int(page.page)
    if state.armed[number] { state.pending.insert(number) }
  }
}
