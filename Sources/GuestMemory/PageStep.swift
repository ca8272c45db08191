// SPDX-License-Identifier: Apache-2.0

/// What happens to a page between its first claim and the release of its memory.
///
/// `PageState.after` says which step may follow which state. The pager changes states by these
/// steps only, and the model in `Tests/PagerTests/PageLifeModel.swift` explores the same ones.
public enum PageStep: Sendable, CaseIterable {
  /// A thread is about to fetch its content.
  case claim
  /// The same for a page that was there: the kernel unmapped a clone's clean page.
  case reclaim
  /// The thread that claimed it gives it back unfilled.
  case giveBack
  /// Proven: its content is there, or the zeros that it is to have.
  case fill
  /// Its content is zero, and the kernel has nothing in its place: it reads as zero by itself.
  case leaveZero
  /// Proven: something is there that this session did not put there.
  case findThere
  /// No right content is to be had, and the kernel makes a touch an error.
  case fail
  /// No right content is to be had, and the kernel is not told.
  case withhold
  /// Its content is looked for again.
  case retry
  /// The guest gives it up (REMOVE).
  case remove
  /// Its mapping is gone (UNMAP, or the kernel knows no such range).
  case unmap
}

extension PageState {
  /// The state after a step; `nil` where the step must not be taken.
  @inlinable
  public func after(_ step: PageStep) -> PageState? {
    switch (step, self) {
    case (.claim, .absent), (.reclaim, .present): .filling
    case (.giveBack, .filling): .absent
    case (.fill, .filling), (.fill, .present), (.fill, .removed), (.fill, .zero): .present
    case (.leaveZero, .filling): .zero
    case (.findThere, .filling), (.findThere, .present), (.findThere, .removed),
      (.findThere, .zero), (.findThere, .poisoned), (.findThere, .withheld):
      .present
    case (.fail, .absent), (.fail, .filling), (.fail, .present), (.fail, .removed), (.fail, .zero):
      .poisoned
    case (.fail, .withheld): .poisoned
    case (.withhold, .filling), (.withhold, .present), (.withhold, .removed), (.withhold, .zero):
      .withheld
    case (.retry, .withheld): .absent
    // What is mapped there since is not what was described: it gives up nothing.
    case (.remove, .unmapped): nil
    case (.remove, _): .removed
    case (.unmap, _): .unmapped
    default: nil
    }
  }

  /// Whether nothing is left to be filled. One that is withheld still has to be made an error before
  /// its memory may be let go of.
  public var isSettled: Bool { self != .absent && self != .filling }
}
