// SPDX-License-Identifier: Apache-2.0

/// Random steps, the same ones for the same seed on every machine.
public struct OperationGenerator: Sendable {
  private var state: UInt64
  private let setup: Setup
  private var nextTag: UInt64 = 1

  /// Steps that suit a setup.
  public init(seed: UInt64, setup: Setup) {
    state = seed
    self.setup = setup
  }

  /// splitmix64 (Steele, Lea, Flood 2014).
  private mutating func random() -> UInt64 {
    state &+= 0x9E37_79B9_7F4A_7C15
    var mixed = state
    mixed = (mixed ^ mixed >> 30) &* 0xBF58_476D_1CE4_E5B9
    mixed = (mixed ^ mixed >> 27) &* 0x94D0_49BB_1331_11EB
    return mixed ^ mixed >> 31
  }

  private mutating func below(_ limit: Int) -> Int { Int(random() % UInt64(limit)) }
  private mutating func oneIn(_ count: Int) -> Bool { below(count) == 0 }

  private mutating func tag() -> UInt64 {
    nextTag += 16
    return nextTag
  }

  /// One to three pages; sometimes all.
  private mutating func range(in pages: Int) -> (first: Int, count: Int) {
    if oneIn(12) { return (0, pages) }
    let first = below(pages)
    return (first, 1 + below(min(3, pages - first)))
  }

  private mutating func span() -> Span {
    let mapping = below(setup.mappings.count)
    let (first, count) = range(in: setup.mappingPages)
    return Span(mapping, first, count)
  }

  private mutating func access() -> Access { oneIn(2) ? .read : .write(tag()) }

  private mutating func register() -> Operation {
    var span = span()
    if oneIn(2) { span = Span(span.mapping, 0, setup.mappingPages) }
    return .register(span, ModelModes(rawValue: UInt8(below(8))))
  }

  private mutating func touch() -> Operation {
    .touch(mapping: below(setup.mappings.count), page: below(setup.mappingPages), access())
  }

  /// The next step.
  public mutating func next() -> Operation {
    switch below(100) {
    case 0..<9: register()
    case 9..<11: .unregister(span())
    case 11..<22: .copy(span(), tag: tag(), writeProtected: oneIn(4), wakes: !oneIn(5))
    case 22..<26: .zeropage(span(), wakes: !oneIn(5))
    case 26..<35: .continue(span(), wakes: !oneIn(5))
    case 35..<39: .poison(span(), wakes: !oneIn(5))
    case 39..<47: .writeProtect(span(), enabled: !oneIn(3), wakes: !oneIn(5))
    case 47..<52: .wake(span())
    case 52..<78: touch()
    case 78..<84:
      .dontNeed(oneIn(3) ? Span(below(setup.mappings.count), 0, setup.mappingPages) : span())
    case 84..<87: .inspectTable(mapping: below(setup.mappings.count))
    default: objectStep()
    }
  }

  private mutating func objectStep() -> Operation {
    if setup.memory == .anonymous { return touch() }
    let (first, count) = range(in: setup.objectPages)
    switch below(setup.memory.isGuestMemfd ? 13 : 9) {
    case 0..<3:
      let readable = setup.memory.isGuestMemfd && oneIn(4) ? below(count + 1) : count
      return .write(first: first, count: count, tag: tag(), readable: readable)
    case 3..<5: return .allocate(first: first, count: count)
    case 5..<8: return .punchHole(first: first, count: count)
    case 8: return .inspectCache
    case 9..<12: return .vcpuTouch(page: first, access())
    default: return .setUserfaultBit(page: first, oneIn(2))
    }
  }
}

/// Makes a failing list of steps shorter.
public enum Shrinker {
  /// Drops halves, quarters and so on down to single steps as long as the rest fails.
  ///
  /// - Parameter attempts: how often to try at most; a failure that comes and goes would
  ///   take long otherwise.
  public static func shrink(
    _ operations: [Operation], attempts: Int = 2000, while fails: ([Operation]) -> Bool
  ) -> [Operation] {
    var attempts = attempts
    var current = operations
    var size = max(1, current.count / 2)
    while true {
      var changed = false
      var start = 0
      while start < current.count {
        var candidate = current
        candidate.removeSubrange(start..<min(start + size, current.count))
        attempts -= 1
        if attempts < 0 { return current }
        if !candidate.isEmpty, fails(candidate) {
          current = candidate
          changed = true
        } else {
          start += size
        }
      }
      if size > 1 {
        size /= 2
      } else if !changed {
        return current
      }
    }
  }
}
