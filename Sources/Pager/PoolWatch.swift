// SPDX-License-Identifier: Apache-2.0

internal import LinuxSystem
internal import Synchronization
internal import SystemPackage
internal import Userfault

/// The sessions of a pool, and what its threads do.
final class PoolWatch: Sendable {
  /// The place of one session. The lock is this session's alone.
  private final class Seat: Sendable {
    struct State {
      var guest: (any PooledGuest)?
      /// Which of those who had the seat one after the other.
      var generation: UInt64 = 0
      /// The threads that others share do not serve it any more.
      var isApart = false
      /// It has a thread of its own.
      var hasThread = false
    }
    let state = Mutex(State())
  }

  /// A session in its seat, as long as it has that.
  struct Place: Hashable, Sendable {
    /// The seat in the low bits, above them the generation.
    let rawValue: UInt64

    init(rawValue: UInt64) { self.rawValue = rawValue }
    fileprivate init(seat: Int, generation: UInt64) {
      rawValue = generation << PoolWatch.seatBits | UInt64(seat)
    }
    fileprivate var seat: Int { Int(rawValue & (1 << PoolWatch.seatBits - 1)) }
    fileprivate var generation: UInt64 { rawValue >> PoolWatch.seatBits }
  }

  /// What an event is about, in the tag's low bits; above them the seat, then its generation. An
  /// event that was reported may be handled after its session has left.
  private enum Kind: UInt64 {
    case faults = 0, process = 1, stop = 2
    static let bits: UInt64 = 2
  }
  fileprivate static var seatBits: UInt64 { 22 }
  /// All that there are: a seat has that many sessions before one of them looks like another.
  private static var generations: UInt64 { UInt64.max >> (seatBits + Kind.bits) }

  private let poller: Poller
  private let stopSign: EventDescriptor
  private let seats: [Seat]
  private let free: Mutex<[Int]>
  private let isStopping = Atomic<Bool>(false)
  private let clock = Monitor(Clock())
  let orphans = PoolOrphans()

  private struct Clock {
    /// In the order in which they are due.
    var postponed: [(place: Place, due: UInt64)] = []
    var sessions = 0
    var isStopping = false
  }

  init(capacity: Int) throws(Errno) {
    let capacity = min(capacity, 1 << Int(Self.seatBits))
    seats = (0..<capacity).map { _ in Seat() }
    free = Mutex(Array((0..<capacity).reversed()))
    poller = try Poller()
    stopSign = try EventDescriptor()
    try poller.add(stopSign.descriptor.rawValue, tag: Kind.stop.rawValue)
  }

  /// Has the threads end.
  func stop() {
    isStopping.store(true, ordering: .releasing)
    stopSign.signal()
    clock.withLock { $0.isStopping = true }
    orphans.stop()
  }

  /// Sessions that there is room for.
  var capacity: Int { seats.count }
  var sessionCount: Int { seats.count - free.withLock { $0.count } }

  // MARK: - Sessions

  /// Has a session served.
  ///
  /// - Returns: where, for `remove`.
  func add(_ guest: any PooledGuest) throws(PagerError) -> Place {
    guard let seat = free.withLock({ $0.popLast() }) else {
      throw PagerError(.resources, "the \(seats.count) sessions that there is room for are there")
    }
    clock.withLock { $0.sessions += 1 }
    let place = seats[seat].state.withLock { state in
      state.guest = guest
      return Place(seat: seat, generation: state.generation)
    }
    do throws(Errno) {
      try poller.addOnce(guest.faultDescriptor, tag: tag(.faults, place))
      if guest.processDescriptor >= 0 {
        try poller.addOnce(guest.processDescriptor, tag: tag(.process, place))
      }
    } catch {
      remove(place, guest, patience: 0)
      throw PagerError(.resources, "the session cannot be watched", errno: error)
    }
    return place
  }

  /// Ends the serving of a session.
  ///
  /// - Parameter patience: how long a turn that is under way is waited for, in nanoseconds.
  /// - Returns: `false` when one is under way still.
  @discardableResult
  func remove(_ place: Place, _ guest: any PooledGuest, patience: UInt64) -> Bool {
    seats[place.seat].state.withLock { state in
      // Whoever has an event of it, or is at the end of its turn, finds that it has left. So
      // nobody watches a descriptor again whose number is another session's by then.
      state = Seat.State(generation: (state.generation + 1) & Self.generations)
      // ENOENT: it was not watched.
      try? poller.remove(guest.faultDescriptor)
      if guest.processDescriptor >= 0 { try? poller.remove(guest.processDescriptor) }
    }
    clock.withLock { $0.sessions -= 1 }
    defer { free.withLock { $0.append(place.seat) } }
    return guest.leave(patience: patience)
  }

  /// Has the threads that others share not serve a session any more.
  ///
  /// - Returns: the session's name; `nil` when it has left.
  func setApart(_ place: Place) -> String? {
    seats[place.seat].state.withLock { state in
      guard state.generation == place.generation, let guest = state.guest else { return nil }
      state.isApart = true
      return guest.name
    }
  }

  /// Has a session reported again, if it is there.
  private func rearm(_ place: Place) {
    seats[place.seat].state.withLock { state in
      guard state.generation == place.generation, !state.isApart, let guest = state.guest
      else { return }
      try? poller.rearm(guest.faultDescriptor, tag: tag(.faults, place))
    }
  }

  /// Has a session reported again after a while.
  private func postpone(_ place: Place) {
    let due = MonotonicClock.nanoseconds &+ Self.delay
    clock.withLock { $0.postponed.append((place, due)) }
  }

  private static var delay: UInt64 { 10_000_000 }

  /// Has the threads that others share serve a session again, if it has no thread of its own.
  func rejoin(_ place: Place) {
    let guest = seats[place.seat].state.withLock { state -> (any PooledGuest)? in
      guard state.generation == place.generation, !state.hasThread else { return nil }
      state.isApart = false
      return state.guest
    }
    rearm(place)
    // Faults that were read before are raised again.
    guest?.wakeAll()
  }

  /// The session of a place, if it is there.
  ///
  /// - Parameter alsoApart: also where the threads that others share do not serve it.
  func guest(at place: Place, alsoApart: Bool = false) -> (any PooledGuest)? {
    seats[place.seat].state.withLock { state in
      state.generation == place.generation && (alsoApart || !state.isApart) ? state.guest : nil
    }
  }

  private func tag(_ kind: Kind, _ place: Place) -> UInt64 {
    place.rawValue << Kind.bits | kind.rawValue
  }

  // MARK: - The threads

  /// Serves sessions until the pool ends, or one of them has the thread.
  func serve(_ worker: PoolWorker, _ tools: inout PoolTools) {
    while !isStopping.load(ordering: .acquiring) {
      if let event = next(milliseconds: worker.hasEager ? 0 : -1) {
        guard handle(event, worker, &tools) else { return }
      }
      if let place = worker.nextEager() {
        guard turn(place, isReadable: true, worker, &tools) else { return }
      }
    }
  }

  /// Waits for the next event.
  func next(milliseconds: CInt) -> Poller.Event? {
    try? poller.wait(milliseconds: milliseconds) ?? nil
  }

  /// Does what an event asks for. One whose session has left is nobody's.
  ///
  /// - Returns: `false` when the thread was its session's, and is not needed any more.
  func handle(_ event: Poller.Event, _ worker: PoolWorker, _ tools: inout PoolTools) -> Bool {
    let place = Place(rawValue: event.tag >> Kind.bits)
    switch Kind(rawValue: event.tag & (1 << Kind.bits - 1)) {
    case .stop, nil: return true
    case .process:
      if guest(at: place, alsoApart: true) != nil { orphans.add(place) }
      return true
    case .faults: return turn(place, isReadable: event.isReadable, worker, &tools)
    }
  }

  private func turn(
    _ place: Place, isReadable: Bool, _ worker: PoolWorker, _ tools: inout PoolTools
  ) -> Bool {
    worker.begin(place)
    // Also letting go of a session that has left meanwhile is part of the turn.
    let next = guest(at: place)?.turn(&tools, isReadable: isReadable) ?? .left
    guard worker.end() else {
      serveApart(place, next, &tools)
      return false
    }
    switch next {
    case .waits: rearm(place)
    case .hasMore: worker.append(place)
    case .later: postpone(place)
    case .left: break
    }
    return true
  }

  /// Serves a session that is apart until it leaves. Nothing when it has a thread already.
  private func serveApart(_ place: Place, _ first: PooledTurn, _ tools: inout PoolTools) {
    let found = seats[place.seat].state.withLock { state -> (any PooledGuest)? in
      guard state.generation == place.generation, !state.hasThread else { return nil }
      (state.isApart, state.hasThread) = (true, true)
      return state.guest
    }
    guard let guest = found else { return }
    let set = PollSet(
      guest.faultDescriptor, guest.stopDescriptor, stopSign.descriptor.rawValue)
    // It may have been apart already when the turn began, and was left alone then; if it has left,
    // its stop sign says so.
    var next = if case .left = first { PooledTurn.waits } else { first }
    while !isStopping.load(ordering: .acquiring) {
      switch next {
      case .left: return
      case .hasMore: next = guest.turn(&tools, isReadable: true)
      case .later:
        Pause.microseconds(UInt32(Self.delay / 1000))
        next = guest.turn(&tools, isReadable: true)
      case .waits:
        guard let ready = try? set.wait() ?? nil else { continue }
        guard ready.tag == 0 else { return }
        next = guest.turn(&tools, isReadable: ready.isReadable)
      }
    }
  }

  // MARK: - The clock

  /// Has postponed sessions reported when they are due, until the pool ends. Without sessions it
  /// sleeps.
  ///
  /// - Parameter look: called as often as that, in nanoseconds.
  func keepTime(every interval: UInt64, _ look: () -> Void) {
    var nextLook: UInt64 = 0
    while true {
      clock.wait { clock -> Void? in clock.isStopping || clock.sessions > 0 ? () : nil }
      let step = clock.wait(until: max(nextLook, 1)) { clock -> ClockStep? in
        if clock.isStopping { return .stop }
        guard let first = clock.postponed.first else { return nil }
        guard first.due <= MonotonicClock.nanoseconds else { return .sleep(until: first.due) }
        return .report(clock.postponed.removeFirst().place)
      }
      switch step {
      case .stop: return
      case .report(let place): rearm(place)
      case .sleep(let due):
        let now = MonotonicClock.nanoseconds
        if due > now { Pause.microseconds(UInt32(min(due - now, Self.delay) / 1000)) }
      case nil: break
      }
      if MonotonicClock.nanoseconds >= nextLook {
        look()
        nextLook = MonotonicClock.nanoseconds &+ interval
      }
    }
  }

  private enum ClockStep { case stop, report(Place), sleep(until: UInt64) }
}

/// What is to be done with a session after its turn.
enum PooledTurn {
  /// Watch it again.
  case waits
  /// It has more to do, without another event.
  case hasMore
  /// What there is to do cannot be done yet: watch it again in a moment.
  case later
  /// It has ended, or was taken out.
  case left
}

/// A session, as its pool sees it.
protocol PooledGuest: AnyObject, Sendable {
  /// For messages.
  var name: String { get }
  var faultDescriptor: CInt { get }
  /// A pidfd, or -1.
  var processDescriptor: CInt { get }
  func turn(_ tools: inout PoolTools, isReadable: Bool) -> PooledTurn
  /// Readable once no more is to be served.
  var stopDescriptor: CInt { get }
  /// Whether there is still an address space with its memory. May take as long as the guest likes.
  var hasMemory: Bool { get }
  /// Its process, and its memory, are gone.
  func processHasEnded()
  /// Has whoever waits for a page fault again.
  func wakeAll()
  /// No turn comes after this.
  ///
  /// - Returns: `false` when one is under way still after so many nanoseconds.
  func leave(patience: UInt64) -> Bool
}
