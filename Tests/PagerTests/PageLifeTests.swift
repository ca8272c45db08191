// SPDX-License-Identifier: Apache-2.0

import Glibc
import GuestMemory
import LinuxSystem
import Synchronization
import SystemPackage
import TestSupport
import Testing
import Userfault

@testable import Pager

@Suite("The life of a page")
struct PageLifeTests {
  /// All lives that can be reached, and how each was: the shortest way.
  private func explore(_ start: PageLife) -> (states: Int, violation: String?, stuck: String?) {
    var parents: [PageLife: (life: PageLife, step: String)?] = [start: nil]
    var queue = [start]
    var index = 0
    func way(to life: PageLife) -> String {
      var steps: [String] = []
      var current = life
      while let parent = parents[current] ?? nil {
        steps.append(parent.step)
        current = parent.life
      }
      return steps.reversed().joined(separator: ", ")
    }
    while index < queue.count {
      let life = queue[index]
      index += 1
      if let violation = life.violation {
        return (queue.count, "\(violation): \(way(to: life))", nil)
      }
      let next = life.next()
      if next.isEmpty, life.lettingGo != .released {
        return (queue.count, nil, "\(life): \(way(to: life))")
      }
      for (name, life) in next where parents[life] == nil {
        parents[life] = .some((queue[index - 1], name))
        queue.append(life)
      }
    }
    return (queue.count, nil, nil)
  }

  @Test(
    "In every order of steps a page that is let go of was content, zeros that are right, or an error",
    arguments: [false, true], [false, true])
  func everyOrder(isHuge: Bool, isZero: Bool) {
    let found = explore(PageLife(isHuge: isHuge, isZeroInSource: isZero, changes: 4))
    #expect(found.violation == nil)
    #expect(found.stuck == nil)
    #expect(found.states > 1000)
    print(
      "the life of a page, \(isHuge ? "2 MiB" : "4 KiB"), \(isZero ? "zero" : "data") in its "
        + "source: \(found.states) states visited")
  }

  @Test(
    "The model finds what each of the pager's rules is for",
    arguments: [
      PageLife.Rules.trustsEveryEEXIST, .releasesWhatIsGivenBack, .ignoresEvents, .passesOverClaims,
    ])
  func mutants(rules: PageLife.Rules) {
    let found = explore(PageLife(isHuge: true, isZeroInSource: false, rules: rules, changes: 4))
    #expect(found.violation != nil)
  }

  @Test("A step changes a state as its name says, or not at all", arguments: PageStep.allCases)
  func steps(step: PageStep) throws {
    let table = try PageStateTable(pageCount: 64)
    for state in PageState.allCases {
      // The way to that state.
      let table = try PageStateTable(pageCount: 8)
      let path: [PageStep] =
        switch state {
        case .absent: []
        case .filling: [.claim]
        case .present: [.claim, .fill]
        case .removed: [.remove]
        case .poisoned: [.claim, .fail]
        case .unmapped: [.unmap]
        case .zero: [.claim, .leaveZero]
        case .withheld: [.claim, .withhold]
        }
      for step in path { table.take(step, 3) }
      let before = table.load(3)
      #expect(before == state)
      let isTaken = table.take(step, 3)
      #expect(isTaken == (state.after(step) != nil))
      let states = (2...4).map { table.load($0) }
      #expect(states == [.absent, state.after(step) ?? state, .absent])
    }
    // Eight at a time is the same as one by one.
    table.take(.claim, 8)
    table.take(step, 1..<63)
    for page in 0..<64 {
      let before: PageState = page == 8 ? .filling : .absent
      let expected = (1..<63).contains(page) ? before.after(step) ?? before : before
      let (found, first) = (table.load(page), table.first(expected, in: page..<64))
      #expect(found == expected, "page \(page)")
      #expect(first == page)
    }
  }

  // MARK: - The real one

  /// What happens around a page; each a step of the model's surroundings.
  private enum Event: String, CaseIterable, CustomStringConvertible {
    case touch, give, empty, refill, holdSource, letSource, fill
    var description: String { rawValue }
  }

  /// A page of a guest, what serves it, and what may be in the page.
  private final class Subject: Sendable {
    let pool: SmallHugePagePool?
    let memory: GuestMemoryObject
    let region: PagedRegion
    let session: PagerSession<HookedSource>
    let isHeld: Mutex<Bool>
    let touches = Mutex<[ThreadHandle]>([])
    let found = Mutex<[GuardedValue]>([])

    init(isHuge: Bool) throws {
      let pool = isHuge ? try SmallHugePagePool(pages: 1) : nil
      let memory =
        if let pool {
          GuestMemoryObject(
            cloneMapping: try pool.makeMapping(pages: 1, sharing: .private), pageSize: .size2MiB)
        } else {
          try GuestMemoryObject(backing: .anonymous, length: 4096)
        }
      let held = Held()
      region = try PagedRegion(
        host: memory.range, pageSize: memory.backing.pageSize, guestAddress: GuestAddress(0))
      var options = PagerOptions(faultThreads: 1)
      options.sourceTimeout = 3_600_000_000_000
      session = try PagerSession(
        userfaultfd: try Userfaultfd(wanting: PagerSession<HookedSource>.features.wanted),
        regions: [region],
        source: HookedSource { _ in
          while held.isHeld.load(ordering: .acquiring) { Delay.microseconds(200) }
        }, options: options)
      self.pool = pool
      self.memory = memory
      isHeld = Mutex(false)
      self.held = held
      try session.start()
    }

    final class Held: Sendable { let isHeld = Atomic<Bool>(false) }
    let held: Held

    func take(_ event: Event) throws {
      switch event {
      case .touch:
        let touch = try ThreadHandle.start {
          let value = guardedLoad(self.memory.range, offset: 0)
          self.found.withLock { $0.append(value) }
        }
        touches.withLock { $0.append(touch) }
        Delay.microseconds(300)
      case .give:
        try memory.mapping.advise(.dontNeed, offset: 0, length: memory.range.length)
      case .empty: try pool?.hold()
      case .refill: try pool?.free()
      case .holdSource: held.isHeld.store(true, ordering: .releasing)
      case .letSource: held.isHeld.store(false, ordering: .releasing)
      case .fill: try session.startFill()
      }
    }

    /// Lets go, then everybody goes on; the source soon after, or only then.
    func end(isStuck: Bool) throws -> LettingGo {
      let helper = try ThreadHandle.start {
        Delay.microseconds(5000)
        if !isStuck { self.held.isHeld.store(false, ordering: .releasing) }
      }
      let outcome = session.letGo()
      helper.join()
      held.isHeld.store(false, ordering: .releasing)
      for touch in touches.withLock({ $0 }) { touch.join() }
      return outcome
    }
  }

  private func run(_ events: [Event], isHuge: Bool, isStuck: Bool = false) throws {
    let subject = try Subject(isHuge: isHuge)
    for event in events { try subject.take(event) }
    let outcome = try subject.end(isStuck: isStuck)
    try subject.pool?.free()
    let last = guardedLoad(subject.memory.range, offset: 0)
    let right = GuardedValue.value(HookedSource.expected(block: 0))
    var allowed = [right, .busError]
    if events.contains(.give) { allowed.append(.value(0)) }
    for value in subject.found.withLock({ $0 }) + [last] {
      #expect(
        allowed.contains(value),
        "\(events), \(outcome), \(subject.session.statistics.alreadyPresent)")
    }
    if outcome == .complete, !events.contains(.give) { #expect(last == right, "\(events)") }
  }

  @Test("The pager does as its model in every order of what happens around a page")
  func realSmallPages() throws { try runAll(isHuge: false) }

  @Test(
    "So it does with huge pages that are not always to be had",
    .enabled(if: SmallHugePagePool.isAvailable, "needs root and huge pages"))
  func realHugePages() throws { try runAll(isHuge: true) }

  /// The kernel asks whether memory is registered, and not with whose userfaultfd: a thread that
  /// comes back late would fill what lies at that address by then.
  @Test(
    "A thread that comes back after the release touches no memory any more",
    arguments: [false, true])
  func lateThread(fills: Bool) throws {
    let held = Subject.Held()
    held.isHeld.store(true, ordering: .releasing)
    let memory = try GuestMemoryObject(backing: .anonymous, length: 4096)
    func makeSession() throws -> PagerSession<HookedSource> {
      let region = try PagedRegion(
        host: memory.range, pageSize: .size4KiB, guestAddress: GuestAddress(0))
      return try PagerSession(
        userfaultfd: try Userfaultfd(wanting: PagerSession<HookedSource>.features.wanted),
        regions: [region],
        source: HookedSource { _ in
          while held.isHeld.load(ordering: .acquiring) { Delay.microseconds(200) }
        })
    }
    let first = try makeSession()
    try first.start()
    var toucher: ThreadHandle?
    if fills {
      try first.startFill()
      #expect(Delay.until { first.regions[0].states.load(0) == .filling })
    } else {
      toucher = try ThreadHandle.start { _ = guardedLoad(memory.range, offset: 0) }
      #expect(Delay.until { first.pendingReads == 1 })
      // Given back while its content is being read, so zeros are what it would get.
      try memory.mapping.advise(.dontNeed, offset: 0, length: 4096)
    }
    first.release()
    toucher?.join()
    try memory.mapping.advise(.dontNeed, offset: 0, length: 4096)
    let second = try makeSession()
    held.isHeld.store(false, ordering: .releasing)
    Delay.microseconds(200_000)
    let present = try memory.mapping.residentPages()
    #expect(present == [false])
    second.release()
  }

  private func runAll(isHuge: Bool) throws {
    let events = Event.allCases.filter { isHuge || ($0 != .empty && $0 != .refill) }
    var runs = 0
    for first in events {
      for second in events {
        for third in events {
          try run([first, second, third], isHuge: isHuge)
          runs += 1
        }
      }
    }
    var random = SeededRandom(seed: 7)
    for number in 0..<200 {
      try run(
        (0..<7).map { _ in events[random.below(events.count)] }, isHuge: isHuge,
        isStuck: number % 50 == 0)
      runs += 1
    }
    #expect(runs > 300)
  }
}
