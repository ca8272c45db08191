// SPDX-License-Identifier: Apache-2.0

internal import DaemonConfiguration
internal import Foundation
internal import HandoverProtocol
internal import LinuxSystem
internal import Logging
internal import MemoryImage
internal import Pager
internal import Synchronization
internal import SystemPackage
internal import VMMAdapters

/// What is known of a VMM that handed over.
struct GuestIdentity: Sendable {
  var name: String?
  var handover: HandoverKind
  var peer: PeerCredentials
}

/// One VMM that is served: its pager session, and what goes with it.
final class GuestSession: Sendable {
  enum Phase: String { case serving, detaching, ending }

  let id: String
  let identity: GuestIdentity
  let image: MemoryImage
  let pager: PagerSession<ImageSource>
  /// What it shares with the other clones of its image, if it is a clone.
  let cache: ImageCache?
  /// With the hand-over of docs/handover.md; its end is the session's.
  let connection: HandoverConnection?
  /// The connection of the hand-over, whichever it is, open as long as the session.
  private let kept: HandoverConnection
  let bytes: Int
  let started = Date()
  private let phase = Mutex(Phase.serving)
  private let log: Logger

  init(
    id: String, identity: GuestIdentity, image: MemoryImage, pager: PagerSession<ImageSource>,
    cache: ImageCache?, regions: [ContentRange], connection: HandoverConnection?,
    kept: HandoverConnection, log: Logger
  ) {
    self.id = id
    self.identity = identity
    self.image = image
    self.pager = pager
    self.cache = cache
    self.connection = connection
    self.kept = kept
    bytes = regions.reduce(0) { $0 + $1.host.length }
    var log = log
    log[metadataKey: "session"] = "\(id)"
    self.log = log
  }

  // MARK: - State

  var currentPhase: Phase { phase.withLock { $0 } }

  /// Goes from serving to another phase; the one before, and `nil` when it is there, or further.
  func enter(_ next: Phase) -> Phase? {
    phase.withLock { phase in
      guard phase == .serving || (phase == .detaching && next == .ending) else { return nil }
      defer { phase = next }
      return phase
    }
  }

  /// Back to serving: it could not be detached. `false` when it is ending meanwhile.
  func stay() -> Bool {
    phase.withLock { phase in
      guard phase == .detaching else { return false }
      phase = .serving
      return true
    }
  }

  /// For lists.
  func summary(withStatistics: Bool) -> ControlMessage.Session {
    let statistics = pager.statistics
    let progress = pager.fillProgress
    return ControlMessage.Session(
      id: id, state: currentPhase.rawValue, name: identity.name,
      handover: identity.handover.rawValue, processID: identity.peer.processID,
      userID: identity.peer.userID, image: image.path.string,
      started: Int(started.timeIntervalSince1970), bytes: bytes, clone: cache != nil,
      records: pager.isRecording,
      faults: statistics.faults, failedPages: statistics.failedPages,
      pendingReads: pager.pendingReads,
      fill: ControlMessage.Fill(
        phase: progress.phase.rawValue, done: progress.done, total: progress.total),
      statistics: withStatistics ? statistics.named : nil)
  }

  // MARK: - Filling

  /// Starts the filling: the image's working set, if it has one and none is being recorded, then
  /// the rest.
  func startFill(rate: Int?, replays: Bool) throws {
    var plan = pager.makeReplayPlan()
    if replays, !pager.isRecording {
      do throws(ImageError) {
        _ = try image.readWorkingSet { plan.add($0) }
      } catch {
        plan = pager.makeReplayPlan()
        log.warning("the image's working set is not used: \(error)")
      }
      // Reading and checking it took more than what is kept of it.
      if !plan.isEmpty { Heap.trim() }
    }
    guard rate != 0 || !plan.isEmpty else { return }
    try pager.startFill(plan, rate: rate) { [weak self] in self?.hasFilled(rate: rate) }
  }

  private func hasFilled(rate: Int?) {
    Heap.trim()
    guard rate != 0 else { return }
    log.info("all pages are filled")
    connection?.push(.filled)
  }

  // MARK: - The end

  /// How an attempt to let go of a VMM ended.
  enum Detachment {
    /// All that has data is there, or the VMM is gone.
    case complete
    /// What is missing is a memory error.
    case cutShort
    /// It is served as before.
    case stays
  }

  /// Fills everything, and lets go of the guest's memory: it needs nobody from here on. Blocks.
  ///
  /// - Parameter isOver: whether there is no more time; pages that did not come are memory errors
  ///   then. Without an end to the time, what cannot be filled stays served.
  func detach(isOver: () -> Bool) -> Detachment {
    pager.stopFill()
    while !pager.hasEnded {
      // What is there is counted when a filling is over, and not before: it looks at every page.
      let isIdle = [.idle, .done].contains(pager.fillProgress.phase)
      if isIdle, pager.isFilled { break }
      if isOver() {
        log.warning("not all of it was filled in time; what is missing is a memory error now")
        pager.stopFill()
        break
      }
      if isIdle {
        // The first time, or it was ended meanwhile.
        do {
          try pager.startFill([], rate: nil)
        } catch {
          log.error("it cannot be filled: \(error)")
          return .stays
        }
      }
      Pause.milliseconds(2)
    }
    return letGo()
  }

  /// Lets go of memory that may still be in use.
  func letGo() -> Detachment {
    if let cache, pager.hasGuest { cache.retire() }
    switch pager.letGo() {
    case .complete: return .complete
    case .missing: return .cutShort
    case .impossible:
      log.warning(
        "it stays: pages are missing, and this kernel cannot make them memory errors (Linux 6.6)")
      return .stays
    }
  }

  /// Waits until a VMM that closed its connection is seen to have exited, if that is why: a clone
  /// that goes on without a session costs the others their cache.
  func awaitExit() {
    guard cache != nil else { return }
    for _ in 0..<100 where pager.hasGuest { Pause.milliseconds(2) }
  }

  /// Puts what was recorded into the image: the one that it was recorded with, whatever has its
  /// name now.
  func storeWorkingSet() throws -> Int {
    let runs = pager.recordedWorkingSet
    try image.storeWorkingSet(runs)
    return runs.reduce(0) { $0 + $1.blockCount }
  }

  /// Tells the VMM.
  func push(_ failure: PageFailure) {
    connection?.push(
      .poisoned(
        hostAddress: failure.hostAddress.rawValue, length: UInt64(failure.pageSize.bytes),
        message: failure.reason))
  }
}
