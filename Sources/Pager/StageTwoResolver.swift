// SPDX-License-Identifier: Apache-2.0

internal import GuestMemory
public import LinuxSystem
public import SystemPackage
internal import Userfault

/// What a vCPU that asked for a page does next.
public enum StageTwoOutcome: Sendable {
  /// The page is there, or is zero and may be allocated: clear its bit and run again.
  case ready
  /// It has no right content: the guest must not go on with it.
  case failed
  /// The session serves no more.
  case ended
}

/// Answers the stage-2 faults of one vCPU, on that vCPU's thread: fills the page cache of
/// the guest_memfd by write(), which maps nothing.
///
/// It shares page states and sources with the faults of user mappings, so a page is fetched
/// once whoever asks first. After it is made it allocates nothing.
public final class StageTwoResolver<Source: PageSource>: @unchecked Sendable {
  // SAFETY: `resolve` is called by one thread, the vCPU's.
  private let session: PagerSession<Source>
  private let slot: PagerSession<Source>.WorkerSlot
  private let bench: Workbench

  init(session: PagerSession<Source>, slot: PagerSession<Source>.WorkerSlot) throws(Errno) {
    self.session = session
    self.slot = slot
    bench = try Workbench(length: PageSize.size4KiB.bytes, waits: true)
  }

  /// Makes the page that holds an address available to vCPUs.
  ///
  /// Waits while another thread is fetching the page. Whoever waits for it in a
  /// userfault is woken and finds it in the page cache.
  public func resolve(_ address: GuestAddress) -> StageTwoOutcome {
    let start = MonotonicClock.nanoseconds
    slot.counters.stageTwoFaults.add()
    guard let region = session.region(at: address) else { return .failed }
    let page = region.page(of: address)
    while true {
      switch region.states.load(page) {
      case .absent:
        guard region.states.claim(from: page, limit: 1) == 1 else { continue }
        let outcome = populate(page, region)
        if outcome == .ready {
          slot.counters.serviceTime.record(MonotonicClock.nanoseconds &- start)
        }
        return outcome
      case .filling:
        // A fault thread has it and is done within microseconds.
        if session.hasEnded { return .ended }
        Pause.yield()
      case .present, .removed, .zero: return .ready
      case .poisoned, .withheld, .unmapped: return .failed
      }
    }
  }

  /// Fills a page that this thread has claimed.
  private func populate(_ page: Int, _ region: PagedRegion) -> StageTwoOutcome {
    let fill: PageFill
    do throws(PageSourceError) {
      guard let found = try session.fetchPatiently(page, region, bench) else {
        throw PageSourceError("the source gave no answer to a thread that waits")
      }
      fill = found
    } catch {
      _ = session.fail(
        page, region, slot.counters, expecting: .filling, reason: error.description)
      return .failed
    }
    var attempts = 0
    while true {
      let failure = session.gate.read { write(fill, page, region) }
      switch failure {
      case nil: return region.states.load(page) == .unmapped ? .failed : .ready
      case .noMemory? where attempts < 100:
        // No memory now need not mean none in a moment; but not for ever.
        attempts += 1
        Pause.microseconds(10_000)
      case let errno?:
        _ = session.fail(
          page, region, slot.counters, expecting: .filling, reason: "\(errno)")
        return .failed
      }
    }
  }

  /// Puts the page into the page cache if it is still wanted. The caller holds the gate.
  private func write(_ fill: PageFill, _ page: Int, _ region: PagedRegion) -> Errno? {
    // Given up or unmapped since it was claimed: what the event said holds.
    guard region.states.load(page) == .filling,
      !session.wasReleased
    else { return nil }
    let range = region.range(of: page)
    if case .staged = fill {
      do throws(Errno) {
        // SAFETY: the bench holds the whole page, which was just fetched.
        let bytes = unsafe UnsafeRawBufferPointer(start: bench.pointer, count: range.length)
        switch region.populator {
        case .none: return .invalidArgument
        case .some(let populator):
          try unsafe populator.write(bytes, at: page * region.pageSize.bytes)
        }
        slot.counters.writtenPages.add()
      } catch .fileExists {
        slot.counters.alreadyPresent.add()
      } catch {
        return error
      }
    } else {
      // KVM allocates a page of zeros by itself.
      slot.counters.zeroPages.add()
    }
    region.states.take(.fill, page)
    // Whoever waits for it in a userfault faults again, and finds it.
    session.memory.wake(range)
    return nil
  }
}

extension PagerSession {
  /// A resolver for one vCPU.
  ///
  /// - Parameter index: below `PagerOptions.stageTwoThreads`; one vCPU each.
  public func makeStageTwoResolver(_ index: Int) throws(Errno) -> StageTwoResolver<Source> {
    guard index >= 0, index < options.stageTwoThreads else { throw .invalidArgument }
    return try StageTwoResolver(
      session: self, slot: counters[options.faultThreads + options.populateThreads + index])
  }

  /// The region that the guest sees at an address.
  func region(at address: GuestAddress) -> PagedRegion? {
    regions.first { region in
      address.rawValue >= region.guestAddress.rawValue
        && address.rawValue - region.guestAddress.rawValue < UInt64(region.host.length)
    }
  }
}

extension PagedRegion {
  /// The page that holds a guest address inside the region.
  func page(of address: GuestAddress) -> Int {
    Int(address.rawValue - guestAddress.rawValue) / pageSize.bytes
  }
}
