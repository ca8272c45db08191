// SPDX-License-Identifier: Apache-2.0

import GuestMemory
import LinuxSystem
import SystemPackage
import Userfault

@testable import Pager

/// The life of one page from its first claim to the release of its memory, with all hands that it
/// passes through, as plain values: small enough that every order of their steps is explored.
///
/// States change by `PageStep` and answers are read by `Finding`, which are the pager's own. One
/// step here is what the pager does under the session's gate, or without anything in between.
struct PageLife: Hashable {
  /// What the guest finds at the page.
  enum Memory: UInt8, Hashable {
    /// Nothing: a touch waits while it is registered, and gives zeros when it is not.
    case nothing
    case content
    case zeros
    /// A touch is a memory error.
    case error
  }

  /// A thread that works on the page.
  enum Hand: UInt8, Hashable {
    case idle
    /// It has read a fault, and not looked at the state.
    case fault
    /// It has claimed the page.
    case claimed
    /// It has what belongs there.
    case fetched
  }

  /// Where the letting go of the session is.
  enum LettingGo: UInt8, Hashable { case serving, sealing, stopping, unserved, released }

  /// What the guest's madvise is at.
  enum Removal: UInt8, Hashable { case none, queued, read }

  // What it is about.
  let isHuge: Bool
  let isZeroInSource: Bool
  let rules: Rules

  var state = PageState.absent
  var memory = Memory.nothing
  var hasRoom = true
  var removal = Removal.none
  /// The guest gave the page up, and has not written since.
  var wasGivenUp = false
  var waits = false
  var faultThread = Hand.idle
  var lane = Hand.idle
  var fill = Hand.idle
  var lettingGo = LettingGo.serving
  /// How often the surroundings may still change: the pool, the guest, the source.
  var changes: UInt8

  /// What the pager does; each can be made wrong, to see that the model would find it.
  struct Rules: OptionSet, Hashable {
    let rawValue: UInt8
    /// EEXIST of UFFDIO_COPY is taken for a page, whatever the memory.
    static let trustsEveryEEXIST = Self(rawValue: 1)
    /// Memory is let go of after claims were given back, with no look at what is left.
    static let releasesWhatIsGivenBack = Self(rawValue: 2)
    /// A page is filled without a look at what events have changed since it was claimed.
    static let ignoresEvents = Self(rawValue: 4)
    /// Seals only what nobody has claimed.
    static let passesOverClaims = Self(rawValue: 8)
  }

  init(isHuge: Bool, isZeroInSource: Bool, rules: Rules = [], changes: UInt8) {
    self.isHuge = isHuge
    self.isZeroInSource = isZeroInSource
    self.rules = rules
    self.changes = changes
  }

  // MARK: - What must hold

  /// What is wrong, if anything is.
  var violation: String? {
    let zerosAreRight = isZeroInSource || wasGivenUp
    if memory == .zeros, !zerosAreRight { return "zeros for content" }
    if memory == .content, wasGivenUp { return "content that was given up came back" }
    if lettingGo == .released, memory == .nothing, !zerosAreRight {
      return "let go of with nothing in its place, in state \(state)"
    }
    if state == .present, memory == .nothing, !wasGivenUp, removal == .none {
      return "taken for present"
    }
    return nil
  }

  /// Whether nothing is left to do: who waits then waits for ever.
  var isAtRest: Bool { next().isEmpty }

  // MARK: - Steps

  /// All states that may follow.
  func next() -> [(name: String, life: PageLife)] {
    var found: [(String, PageLife)] = []
    func add(_ name: String, _ change: (inout PageLife) -> Void) {
      var life = self
      change(&life)
      if life != self { found.append((name, life)) }
    }
    if lettingGo == .released { return [] }
    addSurroundings(add)
    if lettingGo == .serving || lettingGo == .sealing { addFaultThread(add) }
    addLane(add)
    addFill(add)
    addLettingGo(add)
    return found
  }

  private typealias Add = (_ name: String, _ change: (inout PageLife) -> Void) -> Void

  private func addSurroundings(_ add: Add) {
    if !waits, memory == .nothing { add("touch") { $0.waits = true } }
    guard changes > 0 else {
      if removal == .queued, lettingGo != .serving { return }
      if removal == .read { add("madvise goes on") { $0.finishRemoval() } }
      return
    }
    if isHuge {
      add("pool") {
        $0.hasRoom.toggle()
        $0.changes -= 1
      }
    }
    if removal == .none {
      add("madvise") {
        $0.removal = .queued
        $0.changes -= 1
      }
    }
    if removal == .read { add("madvise goes on") { $0.finishRemoval() } }
  }

  private mutating func finishRemoval() {
    removal = .none
    memory = .nothing
    wasGivenUp = true
  }

  /// Reads the event, which is what lets madvise go on, and applies it: the gate is held alone.
  private mutating func readEvent() {
    removal = .read
    take(.remove)
  }

  private func addFaultThread(_ add: Add) {
    if removal == .queued { add("read remove") { $0.readEvent() } }
    switch faultThread {
    case .idle: if waits { add("read fault") { $0.faultThread = .fault } }
    case .fault:
      add("look") { life in
        switch life.state {
        case .absent:
          life.take(.claim)
          life.faultThread = .claimed
        case .removed, .zero, .present:
          life.install(.zeros, expecting: life.state)
          life.faultThread = .idle
        case .filling, .poisoned, .withheld, .unmapped: life.faultThread = .idle
        }
      }
    case .claimed:
      add("at hand") { $0.faultThread = .fetched }
      if lane == .idle {
        add("defer") {
          $0.faultThread = .idle
          $0.lane = .claimed
        }
      }
    case .fetched:
      add("install") { life in
        switch life.install(life.isZeroInSource ? .zeros : .content, expecting: .filling) {
        case .shortage where life.lane == .idle:
          life.faultThread = .idle
          life.lane = .fetched
        case .shortage: break
        case .changing:
          life.take(.giveBack)
          life.faultThread = .fault
        default: life.faultThread = .idle
        }
      }
    }
  }

  private func addLane(_ add: Add) {
    switch lane {
    case .idle, .fault: return
    case .claimed:
      add("lane reads") { $0.lane = .fetched }
      add("lane finds damage") {
        $0.fail()
        $0.lane = .idle
      }
    case .fetched:
      add("lane installs") { life in
        switch life.install(life.isZeroInSource ? .zeros : .content, expecting: .filling) {
        case .shortage: break
        case .changing:
          life.take(.giveBack)
          life.waits = life.memory == .nothing && life.waits
          life.lane = .idle
        default: life.lane = .idle
        }
      }
      if !hasRoom {
        add("lane gives up") {
          $0.fail()
          $0.lane = .idle
        }
      }
    }
    if lettingGo == .stopping {
      add("lane ends") {
        $0.take(.giveBack)
        $0.lane = .idle
      }
    }
  }

  private func addFill(_ add: Add) {
    switch fill {
    case .idle, .fault:
      if state == .absent, lettingGo == .serving {
        add("fill claims") {
          $0.take(.claim)
          $0.fill = .claimed
        }
      }
    case .claimed: add("fill reads") { $0.fill = .fetched }
    case .fetched:
      add("fill installs") { life in
        if life.isZeroInSource {
          // Nothing is put in its place.
          life.take(.leaveZero)
          life.fill = .idle
          return
        }
        switch life.install(.content, expecting: .filling) {
        case .shortage: break
        case .changing:
          life.take(.giveBack)
          life.fill = .idle
        default: life.fill = .idle
        }
      }
      if lettingGo == .stopping {
        add("fill ends") {
          $0.take(.giveBack)
          $0.fill = .idle
        }
      }
    }
  }

  private func addLettingGo(_ add: Add) {
    switch lettingGo {
    case .serving: add("let go") { $0.lettingGo = .sealing }
    case .sealing:
      add("seal") { life in
        if life.state == .absent {
          life.take(.claim)
          guard life.poison() else { return life.take(.giveBack) }
        }
        life.lettingGo = .stopping
      }
    case .stopping:
      // Threads that serve are joined; one that is stuck stays behind, with its claim.
      if faultThread == .idle || faultThread == .fault {
        add("stopped") { $0.lettingGo = .unserved }
      } else {
        add("fault thread ends") { life in
          life.take(.giveBack)
          life.faultThread = .idle
        }
      }
    case .unserved:
      add("read remove, unserved") { life in if life.removal == .queued { life.readEvent() } }
      let isSettled =
        rules.contains(.releasesWhatIsGivenBack)
        || (rules.contains(.passesOverClaims) ? state != .absent : state.isSettled)
      if isSettled {
        add("unregister") { life in
          life.lettingGo = .released
          life.waits = false
          // Who waits to be read goes on.
          if life.removal != .none { life.finishRemoval() }
        }
      } else {
        add("seal unserved") { life in
          if life.state == .absent { life.take(.claim) }
          _ = life.poison()
        }
      }
    case .released: break
    }
  }

  // MARK: - The kernel

  /// UFFDIO_COPY, or ZEROPAGE on small pages, and what the pager makes of the answer.
  @discardableResult
  private mutating func install(_ fill: Memory, expecting expected: PageState) -> Finding? {
    var fill = fill
    if state != expected, !rules.contains(.ignoresEvents) {
      guard state == .removed else { return nil }
      fill = .zeros
    }
    var obstacle: Resolution.Obstacle?
    if removal != .none {
      obstacle = .mappingChanging
    } else if memory == .content || memory == .zeros {
      obstacle = .alreadyPresent
    } else if !hasRoom {
      obstacle = isHuge ? .alreadyPresent : .failed(.noMemory)
    }
    var finding = Finding(
      Resolution(bytesDone: obstacle == nil ? 1 : 0, obstacle: obstacle),
      of: isHuge || fill == .content ? .copy : .zeropage, on: isHuge ? .size2MiB : .size4KiB)
    if rules.contains(.trustsEveryEEXIST), obstacle == .alreadyPresent { finding = .there }
    switch finding {
    case .done:
      memory = fill
      waits = false
      take(.fill)
    case .there:
      waits = false
      take(.fill)
    default: break
    }
    return finding
  }

  /// UFFDIO_POISON; `false` where an event stands before it.
  private mutating func poison() -> Bool {
    guard removal == .none else { return false }
    switch memory {
    case .nothing:
      memory = .error
      take(.fail)
    case .content, .zeros, .error: take(.findThere)
    }
    waits = false
    return true
  }

  private mutating func fail() {
    guard state == .filling else { return }
    if !poison() { take(.giveBack) }
  }

  private mutating func take(_ step: PageStep) {
    if let next = state.after(step) { state = next }
  }
}
