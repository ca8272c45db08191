// SPDX-License-Identifier: Apache-2.0

internal import LinuxSystem
internal import SystemPackage
internal import Userfault

/// What a fault thread sleeps on: the userfaultfd, the stop sign, and the guest's process.
struct FaultWaiter: ~Copyable {
  /// What there is to do; also the place in the poll set.
  enum Tag: UInt64 { case faults, stop, process }

  private var set: PollSet
  private let process: CInt
  private let poller: Poller?

  init<Source>(_ session: borrowing PagerSession<Source>) throws(Errno) {
    let faults = session.memory.userfaultfd.descriptor.rawValue
    let stop = session.stopSign.descriptor.rawValue
    process = session.processDescriptor
    set = PollSet(faults, stop, process)
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

  /// Looks for the end of the process no more.
  mutating func forgetProcess(_ faults: CInt, _ stop: CInt) {
    switch poller {
    case .none: set = PollSet(faults, stop)
    // ENOENT: it was not watched.
    case .some(let poller): try? poller.remove(process)
    }
  }

  /// Sleeps until something happens; `nil` when a signal came, or the time ran out.
  ///
  /// - Parameter milliseconds: negative waits for ever.
  func wait(milliseconds: CInt = -1) throws(Errno) -> Poller.Event? {
    switch poller {
    case .none: try set.wait(milliseconds: milliseconds)
    case .some(let poller): try poller.wait(milliseconds: milliseconds)
    }
  }
}
