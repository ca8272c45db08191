// SPDX-License-Identifier: Apache-2.0

internal import LinuxSystem
internal import SystemPackage
internal import Userfault

extension PagerSession {
  /// How long `stop` waits until the children that are left are sealed, in nanoseconds.
  static var childPatience: UInt64 { 5_000_000_000 }

  /// What takes the children of the guest's process, where forks are events.
  func makeChildren(_ spare: SpareDescriptor?) throws(PagerError) -> ForkedChildren? {
    guard memory.userfaultfd.features.contains(.forkEvents) else { return nil }
    do throws(Errno) {
      let own = if let spare { spare } else { try SpareDescriptor() }
      return try ForkedChildren(regions: regions, spare: own)
    } catch {
      throw PagerError(.resources, "no thread or descriptor for forked children", errno: error)
    }
  }

  /// Answers the faults of a forked child from here on. The caller holds the gate alone.
  func keep(_ child: consuming OwnedDescriptor) {
    do throws(Errno) {
      guard let children else { throw .notSupported }
      try children.take(child, of: memory)
    } catch {
      // The descriptor is closed, and the child's absent pages are zeros: it must not go on.
      end(.failed(error))
    }
  }
}

/// Whether the userfaultfd of a session can be read now: each fork's event brings a descriptor,
/// which may not be had, and a child, for which there may be no room.
struct ForkPace: ~Copyable {
  /// When to try again; 0 where nothing stands in the way.
  private var due: UInt64 = 0

  /// Between two attempts, in nanoseconds.
  static var interval: UInt64 { 10_000_000 }

  /// Whether an event waits that cannot be taken yet.
  var isHeldUp: Bool { due > 0 }

  /// Whether to read now.
  mutating func mayRead(_ children: ForkedChildren?) -> Bool {
    // Without fork events nothing stands in the way.
    guard let children else { return true }
    guard MonotonicClock.nanoseconds >= due else { return false }
    due = children.hasRoom ? 0 : MonotonicClock.nanoseconds &+ Self.interval
    return due == 0
  }

  /// Reads what is pending, with the descriptor in reserve where it takes that.
  ///
  /// Throws what makes it a descriptor that cannot be served.
  mutating func read(
    _ events: inout EventBuffer, _ userfaultfd: borrowing Userfaultfd, _ children: ForkedChildren?
  ) throws(Errno) {
    do throws(Errno) {
      _ = try events.read(from: userfaultfd)
    } catch {
      guard let children, error.isDescriptorShortage else { throw error }
      do throws(Errno) {
        guard children.makeRoom() else { throw error }
        _ = try events.read(from: userfaultfd)
      } catch {
        guard error.isDescriptorShortage else { throw error }
        due = MonotonicClock.nanoseconds &+ Self.interval
      }
    }
  }
}
