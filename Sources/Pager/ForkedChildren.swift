// SPDX-License-Identifier: Apache-2.0

internal import LinuxSystem
internal import Synchronization
internal import SystemPackage
internal import Userfault

/// The children that the process of one session forked, and the thread that answers their faults
/// (`forkedchildren`), which is there before the first of them comes.
///
/// Only so many are watched at a time. Beyond that, and where descriptors run short, the absent
/// pages of the oldest become memory errors (UFFDIO_POISON), and it is let go of.
final class ForkedChildren: Sendable {
  private struct State {
    /// Children that the thread has not seen yet, and where their memory lies.
    var incoming: [WatchedMemory] = []
    /// Children that cannot be let go of.
    var unsealable = 0
    var isFinishing = false
    var hasEnded = false
  }

  private let state = Monitor(State())
  private let regions: [PagedRegion]
  private let spare: SpareDescriptor
  private let poller: Poller
  private let sign: EventDescriptor

  /// Children that are watched at a time.
  static var limit: Int { 64 }
  /// Children that may wait to be watched; while there are more, the session is not read.
  static var queueLimit: Int { 16 }
  /// How often children are asked whether they are still there, in milliseconds.
  private static var interval: CInt { 500 }
  private static var signTag: UInt64 { 0 }

  /// Starts the thread.
  ///
  /// - Parameters:
  ///   - regions: of the session.
  ///   - spare: makes room for a child's descriptor; it is taken back here.
  init(regions: [PagedRegion], spare: SpareDescriptor) throws(Errno) {
    self.regions = regions
    self.spare = spare
    poller = try Poller()
    sign = try EventDescriptor()
    try poller.add(sign.descriptor.rawValue, tag: Self.signTag)
    _ = try NamedThread(name: "forkedchildren") { [self] in
      run()
      state.withLock { $0.hasEnded = true }
    }
  }

  /// Whether a child more may come.
  var hasRoom: Bool {
    state.withLock { $0.incoming.count <= Self.queueLimit && $0.unsealable < Self.limit }
  }

  /// Makes room for one descriptor; `false` where there is none in reserve. The thread has one in
  /// reserve again as soon as it can.
  func makeRoom() -> Bool {
    defer { sign.signal() }
    return spare.giveUp()
  }

  /// Answers the faults of a child from here on. The session's event was read, so it comes.
  ///
  /// - Parameter parent: whose memory it has.
  func take(_ descriptor: consuming OwnedDescriptor, of parent: WatchedMemory) throws(Errno) {
    let child = WatchedMemory(
      try Userfaultfd(adopting: descriptor, features: parent.userfaultfd.features), like: parent)
    state.withLock { $0.incoming.append(child) }
    sign.signal()
  }

  /// Seals and lets go of all; the thread ends then. What takes longer than that goes on without
  /// the caller, and so does a child that cannot be sealed, until it has ended.
  func finish(patience: UInt64) {
    state.withLock { $0.isFinishing = true }
    sign.signal()
    let deadline = MonotonicClock.nanoseconds &+ patience
    let _: Void? = state.wait(until: deadline) { $0.hasEnded ? () : nil }
  }

  // MARK: - The thread

  private func run() {
    /// The oldest first.
    var children: [ForkedChild] = []
    var (lastNumber, nextLook) = (Self.signTag, UInt64(0))
    var events = EventBuffer()
    while true {
      let (incoming, isFinishing) = state.withLock { state in
        defer { state.incoming = [] }
        return (state.incoming, state.isFinishing)
      }
      for memory in incoming {
        lastNumber += 1
        children.append(watch(ForkedChild(lastNumber, memory, regions: regions)))
      }
      guard !isFinishing || !children.isEmpty else { return }
      let unsealable = children.count { $0.isUnsealable }
      if unsealable != state.withLock({ $0.unsealable }) {
        state.withLock { $0.unsealable = unsealable }
      }
      let excess = isFinishing ? children.count : children.count - Self.limit
      // One that is let go of makes room for the descriptor that is missing.
      for child in children.filter({ !$0.isUnsealable }).prefix(max(excess, isShort ? 1 : 0)) {
        child.isSealing = true
      }
      let isBusy = seal(&children)
      if MonotonicClock.nanoseconds >= nextLook {
        drop(&children) { !$0.hasMemory }
        nextLook = MonotonicClock.nanoseconds &+ UInt64(Self.interval) * 1_000_000
      }
      let isOver = isFinishing && children.isEmpty
      let patience: CInt =
        isBusy || isOver
        ? 0 : children.isEmpty ? -1 : children.contains { $0.isSealing } ? 1 : Self.interval
      answer(milliseconds: patience, children, &events)
    }
  }

  /// Whether the descriptor in reserve is gone, and no other can be had.
  private var isShort: Bool { !spare.takeBack() }

  private func watch(_ child: ForkedChild) -> ForkedChild {
    do throws(Errno) {
      try poller.add(child.descriptor, tag: child.number)
    } catch {
      // No memory to watch it with: nobody needs to once it is sealed.
      child.isSealing = !child.isUnsealable
    }
    return child
  }

  /// A piece of each child that is to be sealed; whether there is more to do at once.
  private func seal(_ children: inout [ForkedChild]) -> Bool {
    var isBusy = false
    drop(&children) { child in
      guard child.isSealing else { return false }
      switch child.seal() {
      case .done: return true
      case .goesOn: isBusy = true
      case .waits, .impossible: break
      }
      return false
    }
    return isBusy
  }

  private func drop(_ children: inout [ForkedChild], _ isMeant: (ForkedChild) -> Bool) {
    children.removeAll { child in
      guard isMeant(child) else { return false }
      // Others may have its descriptor too, such as children of this process.
      try? poller.remove(child.descriptor)
      return true
    }
  }

  private func answer(
    milliseconds: CInt, _ children: [ForkedChild], _ events: inout EventBuffer
  ) {
    guard let event = try? poller.wait(milliseconds: milliseconds) ?? nil else { return }
    guard event.tag != Self.signTag else { return sign.reset() }
    guard let child = children.first(where: { $0.number == event.tag }) else { return }
    let reading = child.answer(&events) { descriptor, parent in
      // A child of the child is one as well.
      try? take(descriptor, of: parent)
    }
    switch reading {
    case .done: break
    case .noDescriptor:
      // Its event stays there, and is read once there is room.
      if !spare.giveUp() { Pause.microseconds(10_000) }
    case .failed:
      try? poller.remove(child.descriptor)
      child.isSealing = !child.isUnsealable
    }
  }
}
