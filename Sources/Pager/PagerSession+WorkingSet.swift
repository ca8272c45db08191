// SPDX-License-Identifier: Apache-2.0

internal import GuestMemory
internal import LinuxSystem
public import MemoryImage
public import SystemPackage

extension PagerSession {
  /// Whether first touches are recorded at present.
  public var isRecording: Bool { recorder.isRecording }

  /// Whether they are, or were at some time.
  public var hasRecorded: Bool { recorder.hasRecorded }

  /// Records first touches from here on, after those that were recorded before. Pages that are
  /// there already are not touched for the first time any more. Faults bring nothing along
  /// meanwhile.
  ///
  /// Takes 8 bytes for each page of the session, the first time. Throws what the kernel says when
  /// there is no memory for that.
  public func startRecording() throws(Errno) { try recorder.start() }

  /// Records no more, but for a fault that is under way. What was recorded stays.
  public func stopRecording() { recorder.stop() }

  /// The pages that the guest touched while the session recorded (`PagerOptions.records`,
  /// `startRecording`), in the order of their first touches and by the numbers of the source;
  /// huge pages are 512 blocks or more. Runs that follow each other are one.
  ///
  /// Also while the session runs.
  public var recordedWorkingSet: [WorkingSetRun] {
    var seen: Set<UInt64> = []
    var runs: [WorkingSetRun] = []
    for address in recorder.addresses() where seen.insert(address.rawValue).inserted {
      guard let region = region(at: address) else { continue }
      let size = region.pageSize.bytes
      let offset = region.sourceOffset + region.page(of: address) * size
      let run = WorkingSetRun(
        region: region.sourceRegion, firstBlock: offset / 4096, blockCount: size / 4096)
      if let last = runs.last, last.region == run.region,
        last.firstBlock + last.blockCount == run.firstBlock
      {
        runs[runs.count - 1].blockCount += run.blockCount
      } else {
        runs.append(run)
      }
    }
    return runs
  }

  /// A plan for `replay` and `startFill`, without pages yet.
  public func makeReplayPlan() -> ReplayPlan { ReplayPlan(regions, stepLength: pagesInStep) }

  /// A plan that has the pages of a working set.
  func makeReplayPlan(_ runs: [WorkingSetRun]) -> ReplayPlan {
    var plan = makeReplayPlan()
    for run in runs { plan.add(run) }
    return plan
  }

  /// Brings the pages of a plan that this session made, in its order and those of zeros too:
  /// before the guest runs, or while it does. Its faults go first, for other threads serve them.
  ///
  /// Ends early when the session is stopped. Throws what `populate` throws.
  ///
  /// - Parameter progress: called from the filling threads with bytes done and bytes in all.
  public func replay(
    _ plan: ReplayPlan, progress: (@Sendable (_ done: Int, _ total: Int) -> Void)? = nil
  ) throws(PagerError) {
    // Where one thread ends and another goes on, both decompress the chunk that lies there.
    let failed = statistics.failedPages
    try fill(plan.joined(upTo: 1 << 20), isReplay: true, progress: progress)
    try throwIfDamaged(since: failed)
  }

  /// Brings the pages of a working set that the session has.
  public func replay(
    _ runs: [WorkingSetRun], progress: (@Sendable (_ done: Int, _ total: Int) -> Void)? = nil
  ) throws(PagerError) {
    try replay(makeReplayPlan(runs), progress: progress)
  }

  /// Mapping what a cache has costs less than copying, so more of it fits into a step.
  func pagesInStep(_ region: PagedRegion) -> Int {
    max(1, (region.share == nil ? Self.pieceLength : Self.sharedLength) / region.pageSize.bytes)
  }
}
