// SPDX-License-Identifier: Apache-2.0

/// What one entry of a user page table says.
public enum TableEntry: Hashable, Sendable {
  /// Nothing.
  case none
  /// PTE_MARKER_UFFD_WP: write-protected before it was populated, or when zapped.
  case protectedMarker
  /// PTE_MARKER_POISONED.
  case poison
  /// A page is mapped.
  case mapped(Target, Protection)

  /// What is mapped.
  public enum Target: Hashable, Sendable {
    /// The folio of the page cache.
    case cache
    /// A private copy, or anonymous memory, with its content.
    case copy(UInt64)
    /// The zero page.
    case zero
  }

  /// The userfaultfd bit of a mapped entry.
  public enum Protection: Hashable, Sendable {
    /// Not set.
    case none
    /// Set and write-protected: a write raises an event where WP is registered.
    case armed
    /// Set, but made writable while WP was not registered: a write does not trap. Only
    /// before 7.3, which refuses to drop WP by a registration.
    case stale
  }
}

/// A page of the object (struct folio).
public enum Folio: Hashable, Sendable {
  /// Not in the page cache.
  case absent
  /// In the page cache, not up to date: fallocate(2) made it, its bytes are whatever
  /// the memory held before.
  case allocated
  /// Up to date, with the value of its first word.
  case uptodate(UInt64)
}

/// What a stale page reads as in the model, where a kernel exposes it.
public let staleContent: UInt64 = 0x5AFE_5AFE_5AFE_5AFE

/// How one mapping is made.
public struct MappingSetup: Hashable, Sendable {
  /// MAP_PRIVATE instead of MAP_SHARED.
  public var isPrivate: Bool
  /// Its address in pages, modulo 512: fault-around stays within an aligned window.
  public var phase: Int

  /// A mapping of the whole object and of `Setup.pagesBeyondEnd` after it.
  public init(isPrivate: Bool = false, phase: Int = 0) {
    (self.isPrivate, self.phase) = (isPrivate, phase)
  }
}

/// What a run starts from.
public struct Setup: Hashable, Sendable {
  /// The kind of memory.
  public var memory: ModelMemory
  /// The kernel.
  public var kernel: KernelVariant
  /// Pages of the object; at most 60.
  public var objectPages: Int
  /// Pages that every mapping has after the end of the object. 0 for anonymous memory.
  public var pagesBeyondEnd: Int
  /// The mappings; all have the same length.
  public var mappings: [MappingSetup]
  /// Whether UFFD_FEATURE_WP_UNPOPULATED was negotiated.
  public var protectsUnpopulated: Bool

  /// A run with one mapping of anonymous memory, or two of an object.
  public init(
    _ memory: ModelMemory, kernel: KernelVariant, objectPages: Int = 6, pagesBeyondEnd: Int = 1,
    protectsUnpopulated: Bool = false
  ) {
    self.memory = memory
    self.kernel = kernel
    self.objectPages = objectPages
    self.pagesBeyondEnd = memory == .anonymous ? 0 : pagesBeyondEnd
    self.protectsUnpopulated = protectsUnpopulated
    mappings =
      memory == .anonymous
      ? [MappingSetup(isPrivate: true)]
      : [MappingSetup(isPrivate: memory == .tmpfsPrivate), MappingSetup()]
  }

  /// Pages of each mapping.
  public var mappingPages: Int { objectPages + pagesBeyondEnd }
}

/// A mapping's part of the state.
public struct MappingState: Hashable, Sendable {
  /// How it was made.
  public let setup: MappingSetup
  /// The page table.
  public internal(set) var table: [TableEntry]
  /// The registration of each page; empty where there is none.
  public internal(set) var modes: [ModelModes]
  /// Where a page starts an area that does not merge with the one before it.
  var splits: [Bool]
}

/// A touch that waits in handle_userfault().
public struct Waiter: Hashable, Sendable {
  /// The page, through which mapping, and why.
  public var event: FaultEvent
  /// What it wants to do.
  public var access: Access
}

/// The executable specification: `apply` takes a step and says what it returns.
///
/// A value type: a copy is a snapshot. One process, one userfaultfd without
/// EVENT_REMOVE; touches come from threads, one waiter each.
public struct Model: Hashable, Sendable {
  /// What it started from.
  public let setup: Setup
  /// The page cache of the object; empty for anonymous memory.
  public internal(set) var cache: [Folio]
  /// The mappings.
  public internal(set) var mappings: [MappingState]
  /// Stage 2: which pages the vCPU can reach without an exit. guest_memfd only.
  public internal(set) var stageTwo: [Bool]
  /// The slot's userfault bitmap: `true` makes an access to an unmapped page exit.
  public internal(set) var userfaultBitmap: [Bool]
  /// The touches that wait, oldest first.
  public internal(set) var waiters: [Waiter] = []

  /// The state before the first step.
  public init(_ setup: Setup) {
    self.setup = setup
    let pages = setup.memory == .anonymous ? 0 : setup.objectPages
    cache = Array(repeating: .absent, count: pages)
    stageTwo = Array(repeating: false, count: pages)
    userfaultBitmap = Array(repeating: false, count: pages)
    let length = setup.mappingPages
    mappings = setup.mappings.map { mapping in
      MappingState(
        setup: mapping, table: Array(repeating: .none, count: length),
        modes: Array(repeating: [], count: length),
        splits: Array(repeating: false, count: length))
    }
  }

  /// Takes one step.
  public mutating func apply(_ operation: Operation) -> StepResult {
    switch operation {
    case .register(let span, let modes): return StepResult(register(span, modes))
    case .unregister(let span): return unregister(span)
    case .copy, .zeropage, .continue, .poison: return fill(operation)
    case .writeProtect(let span, let enabled, let wakes):
      let outcome = writeProtect(span, enabled: enabled)
      guard case .done = outcome, !enabled, wakes else { return StepResult(outcome) }
      return StepResult(outcome, resumed: wake(span))
    case .wake(let span): return StepResult(.done(0), resumed: wake(span))
    case .touch(let mapping, let page, let access):
      let outcome = touch(mapping, page, access)
      if case .waits(let event) = outcome { waiters.append(Waiter(event: event, access: access)) }
      return StepResult(outcome)
    case .write(let first, let count, let tag, let readable):
      return StepResult(write(first, count, tag, readable))
    case .allocate(let first, let count): return StepResult(allocate(first, count))
    case .punchHole(let first, let count): return StepResult(punchHole(first, count))
    case .dontNeed(let span): return StepResult(dontNeed(span))
    case .vcpuTouch(let page, let access): return StepResult(vcpuTouch(page, access))
    case .setUserfaultBit(let page, let value):
      guard setup.kernel.stageTwoBitmap, setup.memory.isGuestMemfd else {
        return StepResult(.failed(.EINVAL))
      }
      userfaultBitmap[page] = value
      return StepResult(.done(0))
    case .inspectTable(let mapping):
      let used = mappings[mapping].table.indices.filter { mappings[mapping].table[$0] != .none }
      return StepResult(.pages(bits(used), count: used.count))
    case .inspectCache:
      // hugetlbfs does not tell which pages it has (no SEEK_DATA), only how many.
      let uptodate = cache.indices.filter { page in
        if case .uptodate = cache[page] { setup.memory != .hugetlb } else { false }
      }
      // mincore(2), all that a guest_memfd offers, counts only what is up to date.
      let count =
        setup.memory.isGuestMemfd ? uptodate.count : cache.count { $0 != .absent }
      return StepResult(.pages(bits(uptodate), count: count))
    }
  }

  private func bits(_ pages: [Int]) -> UInt64 { pages.reduce(0) { $0 | 1 << UInt64($1) } }

  // MARK: - Waiting

  /// Wakes the touches in a range; each faults again.
  ///
  /// userfaultfd_wake_function(), mm/userfaultfd.c: by address, whether or not anything
  /// is registered or resolved there.
  mutating func wake(_ span: Span) -> [Outcome] {
    let woken = waiters.filter {
      $0.event.mapping == span.mapping && span.pages.contains($0.event.page)
    }
    waiters.removeAll { waiter in
      waiter.event.mapping == span.mapping && span.pages.contains(waiter.event.page)
    }
    return woken.map { waiter in
      let outcome = touch(waiter.event.mapping, waiter.event.page, waiter.access)
      if case .waits(let event) = outcome {
        waiters.append(Waiter(event: event, access: waiter.access))
      }
      return outcome
    }
  }
}
