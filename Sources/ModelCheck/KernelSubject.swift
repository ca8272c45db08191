// SPDX-License-Identifier: Apache-2.0

internal import CLinux
public import GuestMemoryModel
internal import LinuxSystem
internal import SystemPackage
internal import Userfault

/// What a vCPU does for the kernel's side; the lab has one, the host none.
public protocol StageTwo: AnyObject {
  /// Lets the vCPU touch the first word of a page.
  func touch(page: Int, _ access: Access) -> Outcome
  /// Changes a bit of the slot's userfault bitmap; `false` when there is none.
  func setUserfaultBit(page: Int, _ value: Bool) -> Bool
}

/// Real memory of one kind, with a userfaultfd: takes the same steps as the model and
/// answers with what the kernel did.
///
/// For one thread. Two more belong to it: one makes the touches that wait, one rescues
/// a touch that waits although it should not.
public final class KernelSubject {
  /// The setup of a model that starts where this starts.
  public let setup: Setup

  let userfaultfd: Userfaultfd
  let pageBytes: Int
  private let mappings: [MappedPages]
  private let object: MemoryObject?
  private let source: SourcePages
  private let stageTwo: (any StageTwo)?
  private let toucher: Toucher
  private let pageMap: PageMap
  private var events = EventBuffer(capacity: 4)
  private var hasWaiter = false

  /// A mapping in a box, so that several fit into an array.
  private final class MappedPages {
    let mapping: Mapping
    init(_ mapping: consuming Mapping) { self.mapping = mapping }
    var start: UInt64 { mapping.range.start.rawValue }
  }

  /// New memory of the kind in `setup`, whose phases are filled in here.
  ///
  /// - Parameters:
  ///   - object: the memory object; `nil` makes one, which guest_memfd cannot have.
  ///   - source: pages to copy from, shared between runs.
  public init(
    _ setup: Setup, object: MemoryObject? = nil, source: SourcePages,
    stageTwo: (any StageTwo)? = nil
  ) throws {
    pageBytes = setup.pageBytes
    self.source = source
    self.stageTwo = stageTwo
    let length = setup.mappingPages * pageBytes
    var setup = setup
    var made = object
    if made == nil, setup.memory != .anonymous {
      made = try MemoryObject(length: length, pageBytes: pageBytes)
    }
    var mappings: [MappedPages] = []
    for index in setup.mappings.indices {
      let mapping =
        if let made {
          try made.map(length: length, isPrivate: setup.mappings[index].isPrivate)
        } else {
          try Mapping(anonymous: length)
        }
      let mapped = MappedPages(mapping)
      setup.mappings[index].phase = Int(mapped.start >> 12 & 511)
      if setup.mappings[index].isPrivate {
        // An anon_vma for the whole mapping, so that its areas merge again later on as the
        // model assumes; then back to nothing.
        _ = guardedTouch(mapped.start, .write(1))
        try mapped.mapping.advise(.dontNeed, offset: 0, length: length)
      }
      mappings.append(mapped)
    }
    if let made { try made.cut(to: setup.objectPages * pageBytes) }
    self.mappings = mappings
    self.object = made
    self.setup = setup
    userfaultfd = try Userfaultfd(
      requiring: [.writeProtectFaults],
      wanting: [
        .missingShmem, .missingHugetlbfs, .minorShmem, .minorHugetlbfs, .poison,
        .writeProtectShmemHugetlbfs,
        setup.protectsUnpopulated ? .writeProtectUnpopulated : [],
      ])
    pageMap = try PageMap()
    toucher = try Toucher(
      userfaultfd: userfaultfd.descriptor.rawValue, ranges: mappings.map { $0.mapping.range })
  }

  deinit { toucher.stop() }

  private func address(_ mapping: Int, _ page: Int) -> UInt64 {
    mappings[mapping].start + UInt64(page * pageBytes)
  }

  private func range(_ span: Span) -> HostRange {
    HostRange(
      start: HostAddress(address(span.mapping, span.first)), length: span.count * pageBytes)
  }

  // MARK: - Steps

  /// Takes a step. `expected` says which touches will wait; where the kernel disagrees
  /// the result says what it did instead.
  public func perform(_ operation: Operation, expecting expected: StepResult) -> StepResult {
    let outcome: Outcome
    if case .touch(let mapping, let page, let access) = operation {
      outcome = touch(address(mapping, page), access, waits: expected.outcome.isWaiting)
      if hasWaiter || !expected.outcome.isWaiting { return finish(outcome, expected) }
      hasWaiter = outcome.isWaiting
      return StepResult(outcome)
    }
    do {
      outcome = try call(operation)
    } catch {
      outcome = .failed(ModelErrno(error))
    }
    return finish(outcome, expected)
  }

  /// Adds what became of the touch that waits.
  private func finish(_ outcome: Outcome, _ expected: StepResult) -> StepResult {
    guard hasWaiter else { return StepResult(outcome) }
    // A waiter that should sleep on is only looked at; a late wake shows at a later step.
    guard let news = nextNews(milliseconds: expected.resumed.isEmpty ? 0 : 2000) else {
      return StepResult(outcome)
    }
    hasWaiter = news.isWaiting
    return StepResult(outcome, resumed: [news])
  }

  private func touch(_ address: UInt64, _ access: Access, waits: Bool) -> Outcome {
    if waits, !hasWaiter {
      toucher.start(address, access)
      return nextNews(milliseconds: 2000) ?? .failed(.other)
    }
    let (outcome, wasRescued) = toucher.touchHere(address, access)
    if wasRescued, let event = nextEvent() { return event }
    return outcome
  }

  /// An event, or the end of the touch, whichever comes within the time.
  private func nextNews(milliseconds: CInt) -> Outcome? {
    guard let tag = toucher.waitForNews(milliseconds: milliseconds) else { return nil }
    return tag == Toucher.eventTag ? nextEvent() : toucher.takeResult()
  }

  private func nextEvent() -> Outcome? {
    guard (try? events.read(from: userfaultfd)) ?? 0 > 0, let event = events.pop(),
      case .pageFault(let fault) = event
    else { return nil }
    for index in mappings.indices where mappings[index].mapping.range.contains(fault.address) {
      let offset = Int(fault.address.rawValue - mappings[index].start)
      // An address inside of a page is wrong: it is reported as a page that none has.
      let page = offset % pageBytes == 0 ? offset / pageBytes : -1
      let flags = ModelFaultFlags(rawValue: UInt8(truncatingIfNeeded: fault.flags.rawValue))
      return .waits(FaultEvent(mapping: index, page: page, flags: flags))
    }
    return .waits(FaultEvent(mapping: -1, page: -1, flags: []))
  }

  // MARK: - Calls

  private func call(_ operation: Operation) throws(Errno) -> Outcome {
    switch operation {
    case .register(let span, let modes):
      let kernelModes = RegistrationModes(rawValue: UInt64(modes.rawValue))
      return .done(try userfaultfd.register(range(span), modes: kernelModes).rawValue)
    case .unregister(let span):
      // Not Userfaultfd.unregister(), which adds a wake.
      var argument = uffdio_range(
        start: address(span.mapping, span.first), len: UInt64(span.count * pageBytes))
      _ = try check(
        unsafe clinux_uffd_unregister(userfaultfd.descriptor.rawValue, &argument))
      return .done(0)
    case .copy(let span, let tag, let writeProtected, let wakes):
      let bytes = unsafe source.fill(count: span.count, pageBytes: pageBytes, tag: tag)
      // SAFETY: the source holds as many pages as the largest span has.
      return outcome(
        unsafe userfaultfd.copy(
          from: bytes, to: range(span).start, length: range(span).length,
          writeProtected: writeProtected, wakes: wakes))
    case .zeropage(let span, let wakes):
      return outcome(userfaultfd.zeropage(range(span), wakes: wakes))
    case .continue(let span, let wakes):
      return outcome(userfaultfd.continue(range(span), wakes: wakes))
    case .poison(let span, let wakes):
      return outcome(userfaultfd.poison(range(span), wakes: wakes))
    case .writeProtect(let span, let enabled, let wakes):
      try userfaultfd.writeProtect(range(span), enabled: enabled, wakes: wakes)
      return .done(0)
    case .wake(let span):
      try userfaultfd.wake(range(span))
      return .done(0)
    case .dontNeed(let span):
      try mappings[span.mapping].mapping.advise(
        .dontNeed, offset: span.first * pageBytes, length: span.count * pageBytes)
      return .done(0)
    case .inspectTable(let mapping):
      return try inspectTable(mapping)
    case .vcpuTouch(let page, let access):
      return stageTwo?.touch(page: page, access) ?? .failed(.EINVAL)
    case .setUserfaultBit(let page, let value):
      return stageTwo?.setUserfaultBit(page: page, value) == true ? .done(0) : .failed(.EINVAL)
    case .touch:
      return .failed(.other)
    case .write, .allocate, .punchHole, .inspectCache:
      guard let object else { return .failed(.ENODEV) }
      return try object.perform(operation, pageBytes: pageBytes, source: source)
    }
  }

  private func outcome(_ resolution: Resolution) -> Outcome {
    let pages = resolution.bytesDone / pageBytes
    guard let obstacle = resolution.obstacle else { return .done(UInt64(pages)) }
    let errno: ModelErrno =
      switch obstacle {
      case .alreadyPresent: .EEXIST
      case .mappingChanging, .partial: .EAGAIN
      case .notRegistered: .ENOENT
      case .processGone: .other
      case .absent: .EFAULT
      case .failed(let errno): ModelErrno(errno)
      }
    return .failed(errno, pagesDone: pages)
  }

  private func inspectTable(_ mapping: Int) throws(Errno) -> Outcome {
    var bits: UInt64 = 0
    for part in try pageMap.populatedRanges(in: mappings[mapping].mapping.range) {
      let first = Int(part.start.rawValue - mappings[mapping].start) / pageBytes
      for page in first..<(first + part.length / pageBytes) { bits |= 1 << UInt64(page) }
    }
    return .pages(bits, count: bits.nonzeroBitCount)
  }
}

extension Setup {
  /// Bytes of a page of this memory.
  public var pageBytes: Int {
    memory == .hugetlb ? PageSize.size2MiB.bytes : PageSize.size4KiB.bytes
  }
}

extension Outcome {
  var isWaiting: Bool { if case .waits = self { true } else { false } }
}

extension ModelErrno {
  /// The errno in the model's words.
  init(_ errno: Errno) {
    self =
      switch errno {
      case .notPermitted: .EPERM
      case .noSuchFileOrDirectory: .ENOENT
      case .resourceTemporarilyUnavailable: .EAGAIN
      case .noMemory: .ENOMEM
      case .badAddress: .EFAULT
      case .resourceBusy: .EBUSY
      case .fileExists: .EEXIST
      case .operationNotSupportedByDevice: .ENODEV
      case .invalidArgument: .EINVAL
      case .illegalSeek: .ESPIPE
      case .notSupportedOnSocket: .EOPNOTSUPP
      default: .other
      }
  }
}
