// SPDX-License-Identifier: Apache-2.0

internal import GuestMemory
internal import LinuxSystem
internal import Synchronization
internal import SystemPackage
internal import Userfault

extension PagerSession {
  private static var sealedAtOnce: Int { 512 }
  /// How long what has to come to an end waits for a thread that holds the gate, in nanoseconds. A
  /// guest can keep a thread in the kernel: what is then told too much is an error, never content.
  static var gatePatience: UInt64 { 1_000_000_000 }

  /// Runs a body with the gate, or without it once a thread turned out not to give it back.
  func withGate<Value>(_ body: () -> Value) -> Value {
    let isLost = gateIsLost.load(ordering: .relaxed)
    return gate.read(patience: isLost ? 0 : Self.gatePatience) { isHeld in
      if !isHeld { gateIsLost.store(true, ordering: .relaxed) }
      return body()
    }
  }

  /// Makes a touch of each page without content a memory error (UFFDIO_POISON), so that none of
  /// them turns into zeros when the session lets go of memory that is in use. What the guest gave
  /// back is zero as before. Pages that are being filled are passed over.
  ///
  /// - Returns: `false` where a page is left for which the kernel refused it.
  func seal() -> Bool {
    var isSealed = true
    for region in regions {
      var page = 0
      while let absent = region.states.first(.absent, in: page..<region.pageCount) {
        let claimed = region.states.claim(from: absent, limit: Self.sealedAtOnce)
        isSealed = seal(absent..<absent + claimed, region) && isSealed
        page = absent + max(1, claimed)
      }
    }
    return sealWithheld() && isSealed
  }

  /// The same once nobody serves: also for pages that a thread which is stuck has claimed.
  func sealUnserved() -> Bool {
    // Each time some were given back meanwhile; a thread that comes back does so once.
    for _ in 0..<16 {
      guard !isFilled || hasWithheld else { break }
      for region in regions {
        var page = 0
        while let filling = region.states.first(.filling, in: page..<region.pageCount) {
          guard seal(filling..<filling + 1, region) else { return false }
          page = filling + 1
        }
      }
      guard seal() else { return false }
    }
    return isFilled && !hasWithheld
  }

  /// Pages that are withheld are made errors.
  private func sealWithheld() -> Bool {
    for region in regions {
      var page = 0
      while let failed = region.states.first(.withheld, in: page..<region.pageCount) {
        guard seal(failed..<failed + 1, region) else { return false }
        page = failed + 1
      }
    }
    return true
  }

  /// Poisons pages that are claimed, or have no right content.
  private func seal(_ pages: Range<Int>, _ region: PagedRegion) -> Bool {
    var first = pages.lowerBound
    var attempts = 0
    var events = EventBuffer()
    while first < pages.upperBound {
      let (finding, done) = withGate { poison(first..<pages.upperBound, region) }
      first += done
      if done > 0 { attempts = 0 }
      switch finding {
      // One that an event settled meanwhile is passed over.
      case nil: first += 1
      case .done: break
      case .there, .unregistered:
        memory.wake(region.range(of: first))
        first += 1
      case .noGuest: return true
      case .changing where done > 0: break
      case .changing where attempts < 10_000:
        attempts += 1
        // Each event that is read lets the next one begin: it is tried for a while before.
        if isStopping, attempts % 8 == 0 { dropOne(&events) }
        Pause.microseconds(20)
      case .shortage where attempts < 250:
        attempts += 1
        Pause.microseconds(Self.shortagePace)
      default:
        giveBack(region, first..<pages.upperBound)
        return false
      }
    }
    return true
  }

  /// Poisons the first run of pages that are claimed, or have no right content; how many. The
  /// caller holds the gate.
  private func poison(_ pages: Range<Int>, _ region: PagedRegion) -> (Finding?, Int) {
    let first = pages.lowerBound
    func isMeant(_ page: Int) -> Bool { [.filling, .withheld].contains(region.states.load(page)) }
    let end = pages.first { !isMeant($0) } ?? pages.upperBound
    guard end > first else { return (nil, 0) }
    let resolution = memory.poison(region.range(of: first, count: end - first))
    let done = resolution.bytesDone / region.pageSize.bytes
    region.states.take(.fail, first..<first + done)
    let finding = Finding(resolution, of: .poison, on: region.pageSize)
    switch finding {
    // There all the same, such as a page of zeros that the kernel put there.
    case .there where done == 0: region.states.take(.findThere, first)
    case .unregistered where done == 0: region.states.take(.unmap, first)
    default: break
    }
    return (finding, done)
  }

  /// Reads what stands before a resolution when nobody serves.
  private func dropOne(_ events: inout EventBuffer) {
    var children: [ForkedChild] = []
    _ = gate.tryWrite {
      guard (try? events.read(from: memory.userfaultfd)) != nil else { return }
      while let event = events.pop() {
        switch consume event {
        case .remove(let range): remove(range)
        case .unmap(let range): unmap(range)
        case .remap(let from, let to, let length): move(from: from, to: to, length: length)
        case .fork(let child): children += lateChild(child)
        // It waits until its range is unregistered.
        default: break
        }
      }
    }
    for child in children { child.sealWhole() }
  }

  /// A child whose fork was read after the session had stopped.
  func lateChild(_ descriptor: consuming OwnedDescriptor) -> [ForkedChild] {
    guard
      let userfaultfd = try? Userfaultfd(
        adopting: descriptor, features: memory.userfaultfd.features)
    else { return [] }
    return [ForkedChild(0, WatchedMemory(userfaultfd, like: memory), regions: regions)]
  }

  /// Has clones go on without the session. A page that nobody watches and that is not mapped is
  /// the cache's: so what they gave back is made zeros in place, and the caches take no page out
  /// any more, for as long as they live. Nothing is done where no region is a clone's.
  ///
  /// What a clone gives back later has the image's content when it is touched again.
  ///
  /// - Returns: `false` when a page is left: keep the session until the process has ended.
  func detachClones() -> Bool {
    let clones = regions.filter { $0.share != nil }
    guard !clones.isEmpty else { return true }
    for region in clones { region.share?.cache.retire() }
    let bench: SendableBench
    do throws(Errno) {
      bench = try SendableBench(length: benchLength)
    } catch {
      return false
    }
    return clones.allSatisfy { putZeros($0, bench.buffer) }
  }

  /// Puts zeros where a clone gave pages back and has not touched them since.
  private func putZeros(_ region: PagedRegion, _ bench: borrowing Workbench) -> Bool {
    var (page, attempts) = (0, 0)
    // Under the gate: an event that was read is in the states.
    while let removed = withGate({ region.states.first(.removed, in: page..<region.pageCount) }) {
      page = removed
      let (finding, count) = putZeros(from: removed, region, bench, isFirst: attempts == 0)
      page += count
      switch finding {
      case .done: attempts = 0
      // It was touched, or unmapped.
      case .there, .unregistered: (page, attempts) = (page + 1, 0)
      case .noGuest: return true
      case .changing where count > 0: break
      case .changing where attempts < 10_000:
        attempts += 1
        Pause.microseconds(100)
      case .shortage where attempts < 25:
        attempts += 1
        Pause.microseconds(Self.shortagePace)
      case .shortage:
        // There is no page to be had for it: it stays the error that POISON made of it.
        region.states.take(.fail, removed)
        (page, attempts) = (page + 1, 0)
      default: return false
      }
    }
    return true
  }

  /// Puts zeros into one page of hugetlbfs, or into the first run of smaller ones; how many.
  private func putZeros(
    from first: Int, _ region: PagedRegion, _ bench: borrowing Workbench, isFirst: Bool
  ) -> (Finding, Int) {
    withGate {
      guard region.pageSize != .size4KiB else {
        var count = 1
        while count < Self.sealedAtOnce, first + count < region.pageCount,
          region.states.load(first + count) == .removed
        { count += 1 }
        let resolution = memory.zeropage(region.range(of: first, count: count))
        return (
          Finding(resolution, of: .zeropage, on: region.pageSize), resolution.bytesDone / 4096
        )
      }
      // hugetlbfs has no ZEROPAGE. SAFETY: the bench is as long as a page, and new: zeros.
      let range = region.range(of: first)
      let resolution = unsafe memory.copy(from: bench.pointer, to: range)
      let finding = Finding(resolution, of: .copy, on: region.pageSize)
      guard case .shortage = finding else { return (finding, finding == .done ? 1 : 0) }
      // Whether it is there, POISON tells the first time; a later COPY goes over the error.
      let probe = Finding(memory.poison(range), of: .poison, on: region.pageSize)
      return (probe == .there && isFirst ? .there : finding, 0)
    }
  }
}
