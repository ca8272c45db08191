// SPDX-License-Identifier: Apache-2.0

internal import LinuxSystem

/// The clients of a reception that have not said all yet, and whose turn it is to go. For one
/// thread.
struct WaitingRoom<Client: WaitingClient> {
  static var listenerTag: UInt64 { 0 }
  static var wakeTag: UInt64 { 1 }

  private struct Place {
    let client: Client
    let user: UInt32
    let deadline: UInt64
    /// What it takes: itself, and its descriptors.
    var weight = 1
  }

  private var taken: [UInt64: Place] = [:]
  /// In the order of their deadlines; those that left are passed over.
  private var order: [(deadline: UInt64, tag: UInt64)] = []
  private var first = 0
  private var weights: [UInt32: Int] = [:]
  private var nextTag: UInt64 = 2
  /// What all of them take.
  private(set) var places = 0

  /// Until the first one's time is over; -1 for no end.
  var milliseconds: CInt {
    guard first < order.count else { return -1 }
    let now = MonotonicClock.nanoseconds
    let deadline = order[first].deadline
    return deadline <= now ? 0 : CInt(clamping: (deadline - now + 999_999) / 1_000_000)
  }

  subscript(tag: UInt64) -> Client? { taken[tag]?.client }

  /// Its tag.
  mutating func add(_ client: Client, deadline: UInt64) -> UInt64 {
    defer { nextTag += 1 }
    taken[nextTag] = Place(client: client, user: client.user, deadline: deadline)
    var index = order.count
    while index > first, order[index - 1].deadline > deadline { index -= 1 }
    order.insert((deadline, nextTag), at: index)
    change(nextTag, by: 1)
    update(nextTag)
    return nextTag
  }

  /// Counts its descriptors anew.
  mutating func update(_ tag: UInt64) {
    guard let place = taken[tag] else { return }
    let weight = 1 + place.client.descriptorCount
    change(tag, by: weight - place.weight)
    taken[tag]?.weight = weight
  }

  /// - Returns: its deadline.
  @discardableResult
  mutating func remove(_ tag: UInt64) -> UInt64? {
    guard let place = taken[tag] else { return nil }
    change(tag, by: -place.weight)
    taken[tag] = nil
    passOver()
    return place.deadline
  }

  /// The first one whose time is over.
  mutating func takeExpired() -> Client? {
    passOver()
    guard first < order.count, order[first].deadline <= MonotonicClock.nanoseconds else {
      return nil
    }
    return take(order[first].tag)
  }

  /// The oldest of the user who has most places.
  mutating func takeOldestOfMost() -> Client? {
    guard let user = weights.max(by: { $0.value < $1.value })?.key,
      let entry = order[first...].first(where: { taken[$0.tag]?.user == user })
    else { return nil }
    return take(entry.tag)
  }

  mutating func takeAll() -> [Client] {
    defer { self = Self() }
    return taken.values.map(\.client)
  }

  private mutating func take(_ tag: UInt64) -> Client? {
    let client = taken[tag]?.client
    remove(tag)
    return client
  }

  private mutating func change(_ tag: UInt64, by weight: Int) {
    guard let user = taken[tag]?.user else { return }
    places += weight
    weights[user, default: 0] += weight
    if weights[user] == 0 { weights[user] = nil }
  }

  private mutating func passOver() {
    while first < order.count, taken[order[first].tag] == nil { first += 1 }
    // Those that left in the middle, too, now and then.
    if order.count > 64, order.count > 2 * taken.count {
      order = order[first...].filter { taken[$0.tag] != nil }
      first = 0
    }
  }
}
