// SPDX-License-Identifier: Apache-2.0

internal import LinuxSystem
internal import Synchronization
internal import SystemPackage

/// The guest's process, where there is a pidfd of it.
final class WatchedProcess: Sendable {
  private let descriptor: OwnedDescriptor?
  private let isCondemned = Atomic<Bool>(false)

  init(_ descriptor: consuming OwnedDescriptor?) { self.descriptor = descriptor }

  /// The pidfd's number, or -1.
  var rawValue: CInt {
    switch descriptor {
    case .none: -1
    case .some(let descriptor): descriptor.rawValue
    }
  }

  /// Whether it is to be killed and was not before.
  func condemn() -> Bool {
    rawValue >= 0 && !isCondemned.exchange(true, ordering: .relaxed)
  }

  /// Kills it.
  func kill() {
    switch descriptor {
    case .none: break
    // ESRCH: it is gone already.
    case .some(let descriptor): try? sendKill(to: descriptor)
    }
  }
}
