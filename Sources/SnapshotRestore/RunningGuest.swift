// SPDX-License-Identifier: Apache-2.0

public import MemoryImage
public import Snapshot
public import TestGuest

/// A test guest that runs again from an image. Who serves its memory is up to the type.
public protocol RunningGuest: AnyObject, Sendable {
  /// The image that it came from.
  var image: MemoryImage { get }
  /// The guest, running.
  var guest: TestGuest { get }
  /// Its memory.
  var memory: GuestMemoryHandle { get }
  /// When the restore began: CLOCK_MONOTONIC nanoseconds.
  var startNanoseconds: UInt64 { get }
  /// From there to the guest's creation, in nanoseconds.
  var preparationNanoseconds: UInt64 { get }
  /// Ends the guest, then the serving of its memory. Safe to call again.
  func shutdown()
}

extension RunningGuest {
  /// Waits for the guest's first instruction; nanoseconds since the restore began.
  public func timeToFirstInstruction() throws(SnapshotError) -> UInt64 {
    do throws(GuestError) {
      _ = try guest.timeToFirstInstruction()
    } catch {
      throw SnapshotError(.guest, error.description)
    }
    return (guest.firstInstructionNanoseconds ?? startNanoseconds) - startNanoseconds
  }
}
