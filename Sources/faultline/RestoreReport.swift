// SPDX-License-Identifier: Apache-2.0

import Foundation
import GuestMemory
import LinuxSystem
import Pager
import SnapshotRestore
import TestGuest

/// What `faultline restore` tells; times in nanoseconds from the beginning of the restore.
struct RestoreReport: Codable {
  var image: String
  /// Whether clean pages are those of the service.
  var isClone: Bool
  var backing: String
  var faultMode: String
  var strategy: String
  var guest: String
  var vcpus: Int
  var memoryBytes: Int
  var preparedNanoseconds: UInt64
  var firstInstructionNanoseconds: UInt64 = 0
  var doneNanoseconds: UInt64 = 0
  var verifiedPages: UInt64?
  var wrongPages: UInt64?
  var firstWrongPage: Int?
  var touchedPages: UInt64?
  var touchP50Nanoseconds: UInt64?
  var touchP99Nanoseconds: UInt64?
  /// How the pages of a guest_memfd came.
  var guestMemfd: String?
  /// The name of the session at the service that served the memory; what that did is for
  /// `faultline stats` to say, and not here.
  var session: String?
  // What the pager did, if it was one in this process.
  var missingFaults: UInt64?
  var minorFaults: UInt64?
  var stageTwoFaults: UInt64?
  var writtenPages: UInt64?
  var copiedPages: UInt64?
  var continuedPages: UInt64?
  var zeroPages: UInt64?
  var populatedPages: UInt64?
  /// Pages that came along with others.
  var broughtAlong: UInt64?
  /// Pages whose order went into the image.
  var recordedPages: Int?
  var failedPages: UInt64 = 0
  var serviceP50Nanoseconds: UInt64?
  var serviceP99Nanoseconds: UInt64?
  var damagedPages: [String] = []
  var guestError: String?

  init(_ restored: any RunningGuest, _ command: RestoreCommand) {
    image = command.image
    isClone = command.handover.clone
    backing = restored.memory.backing.description
    faultMode = isClone ? ResolutionMode.minor.rawValue : command.faults.rawValue
    strategy = command.strategy.rawValue
    guest = restored.guest.kind == .kvm ? "kvm" : "process"
    vcpus = restored.guest.vcpuCount
    memoryBytes = restored.memory.range.length
    preparedNanoseconds = restored.preparationNanoseconds
  }

  /// Whether the guest found nothing wrong and nothing was damaged.
  var isRight: Bool { (wrongPages ?? 0) == 0 && failedPages == 0 && guestError == nil }

  mutating func touched(_ result: WorkloadReport) {
    let ticks = MonotonicClock.ticksPerNanosecond()
    let sorted = result.samples.sorted()
    touchedPages = result.pages
    guard !sorted.isEmpty else { return }
    touchP50Nanoseconds = UInt64(Double(sorted[sorted.count / 2]) / ticks)
    touchP99Nanoseconds = UInt64(Double(sorted[sorted.count * 99 / 100]) / ticks)
  }

  /// Takes in what the service told, once the guest has ended.
  mutating func finish(_ restored: HandedOverGuest) {
    session = restored.session
    let (count, descriptions) = restored.failures
    failedPages = UInt64(count)
    damagedPages = descriptions
  }

  /// Takes in what the pager knows at the end.
  mutating func finish(_ restored: RestoredGuest) {
    guestMemfd = restored.guestMemfd?.rawValue
    if restored.guestMemfd == .aheadOfTime { strategy = RestoreStrategy.eager.rawValue }
    let statistics = restored.session.statistics
    missingFaults = statistics.missingFaults
    minorFaults = statistics.minorFaults
    stageTwoFaults = statistics.stageTwoFaults
    writtenPages = statistics.writtenPages
    copiedPages = statistics.copiedPages
    continuedPages = statistics.continuedPages
    zeroPages = statistics.zeroPages
    populatedPages = statistics.populatedPages
    broughtAlong = statistics.broughtAlong
    failedPages = statistics.failedPages
    serviceP50Nanoseconds = statistics.serviceTime.quantile(0.5)
    serviceP99Nanoseconds = statistics.serviceTime.quantile(0.99)
    damagedPages = restored.session.failures.map(\.description)
  }

  func show(json: Bool) throws {
    guard !json else { return try Terminal.printJSON(self) }
    let how = guestMemfd.map { ", \($0)" } ?? (isClone ? ", a clone" : "")
    print(
      "\(strategy) restore of \(image): \(Terminal.size(memoryBytes)) of \(backing) memory\(how)")
    row("guest", "\(guest), \(vcpus) vCPU\(vcpus == 1 ? "" : "s")")
    row("first instruction after", Terminal.duration(firstInstructionNanoseconds))
    row("done after", Terminal.duration(doneNanoseconds))
    if let session { row("served by", "a service, as its session \(session)") }
    showFaults()
    if let recordedPages { row("working set", "\(recordedPages) pages recorded") }
    if let serviceP50Nanoseconds, let serviceP99Nanoseconds {
      row(
        "fault served in",
        "p50 \(Terminal.duration(serviceP50Nanoseconds)), "
          + "p99 \(Terminal.duration(serviceP99Nanoseconds))")
    }
    if let touchP50Nanoseconds, let touchP99Nanoseconds {
      row(
        "touch, seen by the guest",
        "p50 \(Terminal.duration(touchP50Nanoseconds)), "
          + "p99 \(Terminal.duration(touchP99Nanoseconds))")
    }
    if failedPages > 0 { row("damaged pages", "\(failedPages), poisoned") }
    if let guestError { row("guest", guestError) }
    if let wrongPages, let verifiedPages {
      let first = firstWrongPage.map { ", the first is page \($0)" } ?? ""
      print("guest verified: \(verifiedPages) pages, \(wrongPages) wrong\(first)")
    }
  }

  private func showFaults() {
    guard let missingFaults, let minorFaults, let stageTwoFaults, let copiedPages,
      let continuedPages, let writtenPages, let zeroPages
    else { return }
    row(
      "faults",
      "\(missingFaults + minorFaults + stageTwoFaults): \(missingFaults) missing, "
        + "\(minorFaults) minor, \(stageTwoFaults) stage-2")
    let (bulk, along) = (populatedPages ?? 0, broughtAlong ?? 0)
    row(
      "resolved by",
      "\(copiedPages) copy, \(continuedPages) continue, \(writtenPages) write, \(zeroPages) zero"
        + (bulk > 0 ? " (\(bulk) pages in bulk)" : "")
        + (along > 0 ? " (\(along) came along)" : ""))
  }

  private func row(_ label: String, _ value: String) {
    print("  " + label.padding(toLength: 26, withPad: " ", startingAt: 0) + value)
  }
}
