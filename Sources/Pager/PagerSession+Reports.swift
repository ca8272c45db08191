// SPDX-License-Identifier: Apache-2.0

extension PagerSession {
  /// What a session tells.
  enum Report: Sendable {
    case failure(PageFailure)
    /// The guest touched such a page, and is to be killed for it. That is done here so that what
    /// is to be told before is told before, also where the guest is in this process.
    case touched
    case end(PagerError)
  }

  /// How many failures wait for `onFailure`, beyond those that it was given.
  static var reportLimit: Int { 256 }

  /// How long `stop` waits for callbacks, in nanoseconds.
  static var callbackPatience: UInt64 { 1_000_000_000 }

  static func makeReports(
    _ options: PagerOptions, _ process: WatchedProcess
  ) -> Outbox<Report> {
    Outbox(limit: reportLimit) { report in
      switch report {
      case .failure(let failure): options.onFailure?(failure)
      case .touched: process.kill()
      case .end(let error): options.onEnd?(error)
      }
    } omitted: { count in
      options.onFailuresOmitted?(count)
    }
  }

  /// Ends the guest's process where that is the policy.
  func stopGuestIfSo() {
    guard options.onDamage == .stopVMM, process.condemn() else { return }
    reports.post(.touched, always: true)
  }
}
