// SPDX-License-Identifier: Apache-2.0

import KVM
import LinuxSystem
import Synchronization
import SystemPackage
import TestGuest
import Userfault

/// A guest_memfd, its machine, and a mapping of it.
final class SharedGuestMemory {
  static let pageCount = 64

  let machine: VirtualMachine
  let file: OwnedDescriptor
  let mapping: Mapping

  /// - Parameter mappedPages: may go beyond the end of the file.
  init(
    flags: GuestMemfdFlags = [.mmap, .initShared, .write],
    pageCount: Int = SharedGuestMemory
      .pageCount, mappedPages: Int? = nil
  ) throws {
    machine = try VirtualMachine(KVMSystem())
    file = try machine.makeGuestMemfd(length: pageCount * 4096, flags: flags)
    mapping = try Mapping(
      of: file, length: (mappedPages ?? pageCount) * 4096, sharing: .shared)
  }

  func address(_ page: Int) -> HostAddress { mapping.range.start.advanced(by: page * 4096) }

  func range(_ page: Int, count: Int = 1) -> HostRange {
    HostRange(start: address(page), length: count * 4096)
  }

  /// A userfaultfd that watches the mapping.
  func watch(_ modes: RegistrationModes) throws -> Userfaultfd {
    let userfaultfd = try Userfaultfd(wanting: [.missingShmem, .minorShmem, .poison])
    try userfaultfd.register(mapping.range, modes: modes)
    return userfaultfd
  }

  /// pwrite(2) of pages that consist of one word each.
  func write(_ words: [UInt64], at page: Int) throws(Errno) -> Int {
    let bytes = Pages.of(words)
    return try unsafe bytes.withUnsafeBufferPointer { words throws(Errno) in
      try unsafe file.write(UnsafeRawBufferPointer(words), at: page * 4096)
    }
  }
}

/// Content for tests: each page repeats one word.
enum Pages {
  static func of(_ words: [UInt64]) -> [UInt64] {
    words.flatMap { Array(repeating: $0, count: 512) }
  }
}

/// How an access ended.
enum TouchOutcome: Equatable {
  case value(UInt64)
  case busError
  case waits
}

/// An access by a thread of its own, which may have to wait for its page.
final class Toucher: Sendable {
  private struct State { var outcome = TouchOutcome.waits }
  private let state = Mutex(State())

  init(_ address: HostAddress, writing: Bool = false) throws {
    let thread = try NamedThread(name: "toucher") { [self] in
      let value = GuardedMemory.touch(address, writing: writing)
      state.withLock { $0.outcome = value.map { .value($0) } ?? .busError }
    }
    // Detached: whoever never gets its page must not keep the lab waiting.
    _ = thread
  }

  /// Waits up to some milliseconds for the end of the access.
  func outcome(within milliseconds: Int = 10_000) -> TouchOutcome {
    for _ in 0..<milliseconds {
      let outcome = state.withLock { $0.outcome }
      if outcome != .waits { return outcome }
      LabClock.sleep(milliseconds: 1)
    }
    return .waits
  }
}

/// Sleeping without Foundation.
enum LabClock {
  static func sleep(milliseconds: Int) {
    guard let poller = try? Poller() else { return }
    _ = try? poller.wait(milliseconds: CInt(milliseconds))
  }
}

/// Reads what a userfaultfd reports.
struct FaultReader: ~Copyable {
  private var events = EventBuffer()

  /// The next fault, or `nil` when none comes in time.
  mutating func next(
    _ userfaultfd: borrowing Userfaultfd, within milliseconds: Int = 10_000
  ) throws -> PageFault? {
    for _ in 0..<max(1, milliseconds) {
      if events.isEmpty { _ = try events.read(from: userfaultfd) }
      while let event = events.pop() {
        if case .pageFault(let fault) = event { return fault }
      }
      LabClock.sleep(milliseconds: 1)
    }
    return nil
  }

  /// Fails unless this fault comes.
  mutating func expect(
    _ userfaultfd: borrowing Userfaultfd, at address: HostAddress, isMinor: Bool
  ) throws {
    guard let fault = try next(userfaultfd) else {
      throw Mismatch(description: "no fault was reported")
    }
    try require(fault.address == address, "the fault is at \(fault.address), not at \(address)")
    try require(
      fault.flags.contains(.minor) == isMinor,
      "a \(isMinor ? "missing" : "minor") fault was reported as the other kind")
  }

  /// Fails when a fault comes.
  mutating func expectNone(_ userfaultfd: borrowing Userfaultfd) throws {
    let fault = try next(userfaultfd, within: 30)
    try require(fault == nil, "a fault was reported where none should be")
  }
}
