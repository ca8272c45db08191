// SPDX-License-Identifier: Apache-2.0

internal import LinuxSystem
internal import SystemPackage
internal import Userfault

/// What a fault thread sleeps on: the userfaultfd, the stop sign, and the guest's process.
struct FaultWaiter: ~Copyable {
  /// What there is to do; also the place in the poll set.
  enum Tag: UInt64 { case faults, stop, process }

  private let set: PollSet
  private let poller: Poller?

  init<Source>(_ session: borrowing PagerSession<Source>) throws(Errno) {
    let faults = session.memory.userfaultfd.descriptor.rawValue
    let stop = session.stopSign.descriptor.rawValue
    set = PollSet(faults, stop, session.processDescriptor)
    guard session.options.faultThreads > 1 else {
      self.poller = nil
      return
    }
    // poll(2) would wake all threads for each fault.
    let poller = try Poller()
    try poller.add(faults, tag: Tag.faults.rawValue, exclusive: true)
    try poller.add(stop, tag: Tag.stop.rawValue)
    if session.processDescriptor >= 0 {
      try poller.add(session.processDescriptor, tag: Tag.process.rawValue)
    }
    self.poller = consume poller
  }

  /// Sleeps until something happens; `nil` when a signal came.
  func wait() throws(Errno) -> Poller.Event? {
    switch poller {
    case .none: try set.wait()
    case .some(let poller): try poller.wait()
    }
  }
}
