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
    }
    let state = Mutex(State())
  }

  /// A session in its seat, as long as it has that.
  struct Place: Hashable, Sendable {
    fileprivate var seat: Int
    fileprivate var generation: UInt64
  }

  /// What an event is about, in the tag's low bits; above them the seat, then its generation. An
  /// event that was reported may be handled after its session has left.
  private enum Kind: UInt64 {
    case faults = 0, process = 1, stop = 2
    static let bits: UInt64 = 2
  }
  private static var seatBits: UInt64 { 22 }
  /// All that there are: a seat has that many sessions before one of them looks like another.
  private static var generations: UInt64 { UInt64.max >> (seatBits + Kind.bits) }

  private let poller: Poller
  private let stopSign: EventDescriptor
  private let seats: [Seat]
  private let free: Mutex<[Int]>
  private let isStopping = Atomic<Bool>(false)
  private let postponed = Monitor(Postponed())

  private struct Postponed {
    /// In the order in which they are due.
    var places: [(place: Place, due: UInt64)] = []
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
    postponed.withLock { $0.isStopping = true }
  }

  var sessionCount: Int { seats.count - free.withLock { $0.count } }

  // MARK: - Sessions

  /// Has a session served.
  ///
  /// - Returns: where, for `remove`.
  func add(_ guest: any PooledGuest) throws(PagerError) -> Place {
    guard let seat = free.withLock({ $0.popLast() }) else {
      throw PagerError(.resources, "the \(seats.count) sessions that there is room for are there")
    }
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
      remove(place, guest)
      throw PagerError(.resources, "the session cannot be watched", errno: error)
    }
    return place
  }

  /// Ends the serving of a session; none of its turns is under way afterwards.
  func remove(_ place: Place, _ guest: any PooledGuest) {
    seats[place.seat].state.withLock { state in
      // Whoever has an event of it, or is at the end of its turn, finds that it has left. So
      // nobody watches a descriptor again whose number is another session's by then.
      state.generation = (state.generation + 1) & Self.generations
      state.guest = nil
      // ENOENT: it was not watched.
      try? poller.remove(guest.faultDescriptor)
      if guest.processDescriptor >= 0 { try? poller.remove(guest.processDescriptor) }
    }
    guest.leave()
    free.withLock { $0.append(place.seat) }
  }

  /// Has a session reported again, if it is there.
  private func rearm(_ place: Place) {
    seats[place.seat].state.withLock { state in
      guard state.generation == place.generation, let guest = state.guest else { return }
      try? poller.rearm(guest.faultDescriptor, tag: tag(.faults, place))
    }
  }

  /// Has a session reported again after a while.
  private func postpone(_ place: Place) {
    let due = MonotonicClock.nanoseconds &+ Self.delay
    postponed.withLock { $0.places.append((place, due)) }
  }

  private static var delay: UInt64 { 10_000_000 }

  private func guest(at place: Place) -> (any PooledGuest)? {
    seats[place.seat].state.withLock { $0.generation == place.generation ? $0.guest : nil }
  }

  private func tag(_ kind: Kind, _ place: Place) -> UInt64 {
    (place.generation << Self.seatBits | UInt64(place.seat)) << Kind.bits | kind.rawValue
  }

  private func place(of tag: UInt64) -> Place {
    let seat = tag >> Kind.bits & (1 << Self.seatBits - 1)
    return Place(seat: Int(seat), generation: tag >> (Kind.bits + Self.seatBits))
  }

  // MARK: - The threads

  /// What the pool's own thread (`poolwatch`) does.
  func watch() {
    while true {
      let next = postponed.wait { state -> (place: Place, due: UInt64)?? in
        if state.isStopping { return .some(nil) }
        guard !state.places.isEmpty else { return nil }
        return state.places.removeFirst()
      }
      guard let next else { return }
      let now = MonotonicClock.nanoseconds
      if next.due > now { Pause.microseconds(UInt32((next.due - now) / 1000)) }
      rearm(next.place)
    }
  }

  /// Sessions that have more to do than they were reported for; one thread has them. Nobody is
  /// kept in here for longer than that.
  typealias Eager = [(guest: any PooledGuest, place: Place)]

  func serve(_ tools: inout PoolTools) {
    var eager: Eager = []
    eager.reserveCapacity(seats.count)
    while !isStopping.load(ordering: .acquiring) {
      if let event = next(milliseconds: eager.isEmpty ? -1 : 0) {
        handle(event, &eager, &tools)
      }
      // The one that has waited longest of those who have more to do.
      if !eager.isEmpty {
        let (guest, place) = eager.removeFirst()
        turn(guest, place, isReadable: true, &eager, &tools)
      }
    }
  }

  /// Waits for the next event.
  func next(milliseconds: CInt) -> Poller.Event? {
    try? poller.wait(milliseconds: milliseconds) ?? nil
  }

  /// Does what an event asks for. One whose session has left is nobody's.
  func handle(_ event: Poller.Event, _ eager: inout Eager, _ tools: inout PoolTools) {
    switch Kind(rawValue: event.tag & (1 << Kind.bits - 1)) {
    case .stop, nil: break
    case .process: guest(at: place(of: event.tag))?.processHasEnded()
    case .faults:
      let place = place(of: event.tag)
      guard let guest = guest(at: place) else { return }
      turn(guest, place, isReadable: event.isReadable, &eager, &tools)
    }
  }

  private func turn(
    _ guest: any PooledGuest, _ place: Place, isReadable: Bool, _ eager: inout Eager,
    _ tools: inout PoolTools
  ) {
    switch guest.turn(&tools, isReadable: isReadable) {
    case .waits: rearm(place)
    case .hasMore: eager.append((guest, place))
    case .later: postpone(place)
    case .left: break
    }
  }
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
  var faultDescriptor: CInt { get }
  /// A pidfd, or -1.
  var processDescriptor: CInt { get }
  func turn(_ tools: inout PoolTools, isReadable: Bool) -> PooledTurn
  func processHasEnded()
  /// No turn comes after this.
  func leave()
}
