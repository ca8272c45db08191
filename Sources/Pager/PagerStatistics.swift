// SPDX-License-Identifier: Apache-2.0

internal import Synchronization

/// What a session has done so far.
public struct PagerStatistics: Sendable {
  /// Page faults by kind as the kernel reported them.
  public var missingFaults: UInt64 = 0
  /// Faults on pages that were in the page cache already.
  public var minorFaults: UInt64 = 0
  /// Stage-2 faults: a vCPU left KVM_RUN to ask for a page.
  public var stageTwoFaults: UInt64 = 0
  /// Pages filled from the source by UFFDIO_COPY.
  public var copiedPages: UInt64 = 0
  /// Pages mapped by UFFDIO_CONTINUE.
  public var continuedPages: UInt64 = 0
  /// Pages put into a guest_memfd by write(), for a stage-2 fault.
  public var writtenPages: UInt64 = 0
  /// Pages resolved as zeros.
  public var zeroPages: UInt64 = 0
  /// Faults on a page that another thread was filling.
  public var coalescedFaults: UInt64 = 0
  /// Faults on pages that the source did not have at hand.
  public var deferredFaults: UInt64 = 0
  /// EEXIST: the page was there already; its waiters were woken.
  public var alreadyPresent: UInt64 = 0
  /// Attempts to fill a page for which there was no memory.
  public var shortages: UInt64 = 0
  /// EAGAIN: an event had to be read first.
  public var retries: UInt64 = 0
  /// Remove events (madvise).
  public var removeEvents: UInt64 = 0
  /// Unmap events (munmap).
  public var unmapEvents: UInt64 = 0
  /// Ranges that the guest's process moved (mremap).
  public var remapEvents: UInt64 = 0
  /// Children that it forked.
  public var forkEvents: UInt64 = 0
  /// Pages without right content.
  public var failedPages: UInt64 = 0
  /// Pages that came along with a fault on another one, or ahead of the guest.
  public var broughtAlong: UInt64 = 0
  /// Pages filled by `populate`, ahead of or behind the faults.
  public var populatedPages: UInt64 = 0
  /// From reading a fault to having resolved it.
  public var serviceTime = LatencyHistogram()

  /// Nothing yet.
  public init() {}

  /// Adds what another session has done.
  public mutating func add(_ other: PagerStatistics) {
    missingFaults += other.missingFaults
    minorFaults += other.minorFaults
    stageTwoFaults += other.stageTwoFaults
    copiedPages += other.copiedPages
    continuedPages += other.continuedPages
    writtenPages += other.writtenPages
    zeroPages += other.zeroPages
    coalescedFaults += other.coalescedFaults
    deferredFaults += other.deferredFaults
    alreadyPresent += other.alreadyPresent
    shortages += other.shortages
    retries += other.retries
    removeEvents += other.removeEvents
    unmapEvents += other.unmapEvents
    remapEvents += other.remapEvents
    forkEvents += other.forkEvents
    failedPages += other.failedPages
    broughtAlong += other.broughtAlong
    populatedPages += other.populatedPages
    serviceTime.add(other.serviceTime)
  }

  /// All page faults.
  public var faults: UInt64 { missingFaults + minorFaults + stageTwoFaults }
}

/// One thread's share of the statistics. Only that thread writes.
struct WorkerCounters: ~Copyable, Sendable {
  let missingFaults = Atomic<UInt64>(0)
  let minorFaults = Atomic<UInt64>(0)
  let stageTwoFaults = Atomic<UInt64>(0)
  let writtenPages = Atomic<UInt64>(0)
  let copiedPages = Atomic<UInt64>(0)
  let continuedPages = Atomic<UInt64>(0)
  let zeroPages = Atomic<UInt64>(0)
  let coalescedFaults = Atomic<UInt64>(0)
  let deferredFaults = Atomic<UInt64>(0)
  let alreadyPresent = Atomic<UInt64>(0)
  let shortages = Atomic<UInt64>(0)
  let retries = Atomic<UInt64>(0)
  let removeEvents = Atomic<UInt64>(0)
  let unmapEvents = Atomic<UInt64>(0)
  let remapEvents = Atomic<UInt64>(0)
  let forkEvents = Atomic<UInt64>(0)
  let failedPages = Atomic<UInt64>(0)
  let populatedPages = Atomic<UInt64>(0)
  let broughtAlong = Atomic<UInt64>(0)
  let serviceTime = AtomicHistogram()

  borrowing func add(to total: inout PagerStatistics) {
    total.missingFaults += missingFaults.load(ordering: .relaxed)
    total.minorFaults += minorFaults.load(ordering: .relaxed)
    total.stageTwoFaults += stageTwoFaults.load(ordering: .relaxed)
    total.writtenPages += writtenPages.load(ordering: .relaxed)
    total.copiedPages += copiedPages.load(ordering: .relaxed)
    total.continuedPages += continuedPages.load(ordering: .relaxed)
    total.zeroPages += zeroPages.load(ordering: .relaxed)
    total.coalescedFaults += coalescedFaults.load(ordering: .relaxed)
    total.deferredFaults += deferredFaults.load(ordering: .relaxed)
    total.alreadyPresent += alreadyPresent.load(ordering: .relaxed)
    total.shortages += shortages.load(ordering: .relaxed)
    total.retries += retries.load(ordering: .relaxed)
    total.removeEvents += removeEvents.load(ordering: .relaxed)
    total.unmapEvents += unmapEvents.load(ordering: .relaxed)
    total.remapEvents += remapEvents.load(ordering: .relaxed)
    total.forkEvents += forkEvents.load(ordering: .relaxed)
    total.failedPages += failedPages.load(ordering: .relaxed)
    total.broughtAlong += broughtAlong.load(ordering: .relaxed)
    total.populatedPages += populatedPages.load(ordering: .relaxed)
    serviceTime.add(to: &total.serviceTime)
  }
}

extension Atomic where Value == UInt64 {
  /// Adds without a locked instruction: for counters that one thread writes.
  borrowing func add(_ amount: UInt64 = 1) {
    store(load(ordering: .relaxed) &+ amount, ordering: .relaxed)
  }
}
