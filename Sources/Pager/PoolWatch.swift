// SPDX-License-Identifier: Apache-2.0

internal import LinuxSystem
internal import Synchronization
internal import SystemPackage
internal import Userfault

/// The sessions of a pool, and what its threads do.
final class PoolWatch: Sendable {
  /// The place of one session. The lock is this session's alone.
  private final class Seat: Sendable {
    let guest = Mutex<(any PooledGuest)?>(nil)
  }

  /// What an event is about, in the tag's low bits; above them the seat.
  private enum Kind: UInt64 {
    case faults = 0, process = 1, stop = 2
    static let bits: UInt64 = 2
  }

  private let poller: Poller
  private let stopSign: EventDescriptor
  private let seats: [Seat]
  private let free: Mutex<[Int]>
  private let isStopping = Atomic<Bool>(false)

  init(capacity: Int) throws(Errno) {
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
  }

  var sessionCount: Int { seats.count - free.withLock { $0.count } }

  // MARK: - Sessions

  /// Has a session served.
  ///
  /// - Returns: the seat, for `remove`.
  func add(_ guest: any PooledGuest) throws(PagerError) -> Int {
    guard let seat = free.withLock({ $0.popLast() }) else {
      throw PagerError(.resources, "the \(seats.count) sessions that there is room for are there")
    }
    seats[seat].guest.withLock { $0 = guest }
    do throws(Errno) {
      try poller.addOnce(guest.faultDescriptor, tag: tag(.faults, seat))
      if guest.processDescriptor >= 0 {
        try poller.addOnce(guest.processDescriptor, tag: tag(.process, seat))
      }
    } catch {
      remove(seat, guest)
      throw PagerError(.resources, "the session cannot be watched", errno: error)
    }
    return seat
  }

  /// Ends the serving of a session; none of its turns is under way afterwards.
  func remove(_ seat: Int, _ guest: any PooledGuest) {
    // ENOENT: it was not watched.
    try? poller.remove(guest.faultDescriptor)
    if guest.processDescriptor >= 0 { try? poller.remove(guest.processDescriptor) }
    seats[seat].guest.withLock { $0 = nil }
    guest.leave()
    free.withLock { $0.append(seat) }
  }

  private func tag(_ kind: Kind, _ seat: Int) -> UInt64 {
    UInt64(seat) << Kind.bits | kind.rawValue
  }

  // MARK: - The threads

  func serve(_ tools: inout PoolTools) {
    // Sessions that have more to do than they were reported for; this thread has them. Nobody is
    // kept in here for longer than that.
    var eager: [(guest: any PooledGuest, seat: Int)] = []
    eager.reserveCapacity(seats.count)
    while !isStopping.load(ordering: .acquiring) {
      if let event = try? poller.wait(milliseconds: eager.isEmpty ? -1 : 0) ?? nil {
        let seat = Int(event.tag >> Kind.bits)
        switch Kind(rawValue: event.tag & (1 << Kind.bits - 1)) {
        case .stop, nil: return
        case .process:
          seats[seat].guest.withLock { $0 }?.processHasEnded()
        case .faults:
          // One that took the seat meanwhile finds nothing to read.
          if let guest = seats[seat].guest.withLock({ $0 }) {
            turn(guest, seat, isReadable: event.isReadable, &eager, &tools)
          }
        }
      }
      // The one that has waited longest of those who have more to do.
      if !eager.isEmpty {
        let (guest, seat) = eager.removeFirst()
        turn(guest, seat, isReadable: true, &eager, &tools)
      }
    }
  }

  private func turn(
    _ guest: any PooledGuest, _ seat: Int, isReadable: Bool,
    _ eager: inout [(guest: any PooledGuest, seat: Int)], _ tools: inout PoolTools
  ) {
    switch guest.turn(&tools, isReadable: isReadable) {
    case .waits: try? poller.rearm(guest.faultDescriptor, tag: tag(.faults, seat))
    case .hasMore: eager.append((guest, seat))
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
