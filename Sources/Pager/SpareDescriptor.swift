// SPDX-License-Identifier: Apache-2.0

internal import LinuxSystem
internal import Synchronization
internal import SystemPackage

/// A descriptor that is kept open for the moment when no other can be had: it is closed then, and
/// makes room for one.
final class SpareDescriptor: Sendable {
  private let kept: Mutex<EventDescriptor?>

  init() throws(Errno) { kept = Mutex(try EventDescriptor()) }

  /// Makes room for a descriptor; `false` when that was done before.
  func giveUp() -> Bool {
    kept.withLock { kept in
      defer { kept = nil }
      return kept != nil
    }
  }

  /// Has one in reserve again, if one can be had.
  func takeBack() -> Bool {
    kept.withLock { kept in
      if kept == nil { kept = try? EventDescriptor() }
      return kept != nil
    }
  }
}

extension Errno {
  /// Whether a descriptor, or memory for one, could not be had. read(2) of a userfaultfd answers
  /// so when a fork's event is next, which brings one; the event stays where it is.
  var isDescriptorShortage: Bool {
    self == .tooManyOpenFiles || self == .tooManyOpenFilesInSystem || self == .noMemory
  }
}
