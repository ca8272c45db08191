// SPDX-License-Identifier: Apache-2.0

/// How a session runs.
public struct PagerOptions: Sendable {
  /// Threads that serve faults.
  public var faultThreads: Int
  /// Threads that `populate` uses.
  public var populateThreads: Int
  /// vCPUs whose stage-2 faults the session answers (`makeStageTwoResolver`).
  public var stageTwoThreads: Int = 0
  /// With one fault thread: how long it looks for the next fault before it sleeps, in
  /// nanoseconds, while faults come that fast. 0 switches it off.
  public var busyPollNanoseconds: UInt64 = 100_000
  /// Remembers the order in which pages are first touched (`recordedWorkingSet`) from the start
  /// on, in 8 bytes for each page of the session. Faults bring nothing along then, so that it is
  /// the guest's order. `startRecording` and `stopRecording` change it while the session runs.
  public var records = false
  /// What messages about several sessions call this one.
  public var name = ""
  /// How many neighbours a fault brings along.
  public var faultAround = FaultAround.adaptive
  /// Threads that read what a source does not have at hand. They come when they are needed, and
  /// go again.
  public var sourceThreads: Int = 4
  /// How long a page may take: for so long a source that is out of reach is asked again, and a
  /// read that does not come back is waited for. Then the page has no right content. In
  /// nanoseconds.
  public var sourceTimeout: UInt64 = 30_000_000_000
  /// What becomes of a page without right content.
  public var onDamage = DamagePolicy.poison
  /// Called when a page has no right content.
  ///
  /// This and the next two come from a thread that serves no faults (`report`), one of the
  /// session's or its pool's, in the order in which things happened, also after `stop` when they
  /// take long. They may take their time: of the sessions of a pool only the callbacks wait
  /// meanwhile. They may call `stop` and `release`.
  public var onFailure: (@Sendable (PageFailure) -> Void)?
  /// Called with how many failures `onFailure` was not told of, because 256 of them waited
  /// already.
  public var onFailuresOmitted: (@Sendable (Int) -> Void)?
  /// Called once when the session can serve no more, after all failures: waiters wait from then
  /// on.
  public var onEnd: (@Sendable (PagerError) -> Void)?

  /// Options with the defaults: one thread for faults, which is best for a guest with
  /// one vCPU, and two for filling.
  public init(
    faultThreads: Int = 1, populateThreads: Int = 2,
    onFailure: (@Sendable (PageFailure) -> Void)? = nil,
    onEnd: (@Sendable (PagerError) -> Void)? = nil
  ) {
    self.faultThreads = max(1, faultThreads)
    self.populateThreads = max(1, populateThreads)
    self.onFailure = onFailure
    self.onEnd = onEnd
  }
}

/// What a session does about a page that has no right content. Whatever it is, nothing else is
/// ever put in its place.
public enum DamagePolicy: String, Sendable, CaseIterable {
  /// A touch is a memory error (UFFDIO_POISON); where the kernel has none (before Linux 6.6), as
  /// `wait`.
  case poison
  /// Who touches it waits; `retryFailed` looks for its content again.
  case wait
  /// The guest's process is killed (SIGKILL through the session's pidfd) once it touches such a
  /// page. Until it is gone, and where there is no pidfd, as `wait`.
  case stopVMM = "stop-vmm"
}
