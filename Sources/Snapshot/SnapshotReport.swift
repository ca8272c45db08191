// SPDX-License-Identifier: Apache-2.0

/// What a snapshot cost, in nanoseconds of CLOCK_MONOTONIC and 4 KiB pages.
public struct SnapshotReport: Hashable, Sendable {
  /// How long the guest did not run, and with what. A guest that was paused before, or is left
  /// paused, counts for as long as the snapshot took.
  public struct Pause: Hashable, Sendable {
    /// Until all vCPUs stood still.
    public var stopping: UInt64 = 0
    /// Taking the states of vCPUs and devices.
    public var savingState: UInt64 = 0
    /// Finding out what was written, and protecting it again.
    public var tracking: UInt64 = 0
    /// Copying memory; 0 for a live snapshot.
    public var copying: UInt64 = 0
    /// Letting the vCPUs go on.
    public var resuming: UInt64 = 0

    /// All of it.
    public var total: UInt64 { stopping + savingState + tracking + copying + resuming }
  }

  /// The parts of the pause.
  public var pause = Pause()
  /// From the call to the image being on stable storage.
  public var duration: UInt64 = 0
  /// Write-protecting memory ahead of the pause, while the guest ran; 0 when it was paused.
  public var arming: UInt64 = 0
  /// Pages that were looked at.
  public var pages = 0
  /// Of those, pages that the guest wanted to write before they were in the image: they were
  /// copied first.
  public var copiedFirst = 0
  /// How often the guest had to wait because those came faster than they could be stored.
  public var stalls = 0

  /// Nothing yet.
  public init() {}
}
