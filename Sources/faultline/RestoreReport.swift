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
  var missingFaults: UInt64 = 0
  var minorFaults: UInt64 = 0
  var stageTwoFaults: UInt64 = 0
  var writtenPages: UInt64 = 0
  /// How the pages of a guest_memfd came.
  var guestMemfd: String?
  var copiedPages: UInt64 = 0
  var continuedPages: UInt64 = 0
  var zeroPages: UInt64 = 0
  var populatedPages: UInt64 = 0
  /// Pages that came along with others.
  var broughtAlong: UInt64 = 0
  /// Pages whose order went into the image.
  var recordedPages: Int?
  var failedPages: UInt64 = 0
  var serviceP50Nanoseconds: UInt64?
  var serviceP99Nanoseconds: UInt64?
  var damagedPages: [String] = []
  var guestError: String?

  init(_ restored: RestoredGuest, _ command: RestoreCommand) {
    image = command.image
    backing = command.memoryOptions.backing.description
    faultMode = command.faults.rawValue
    guestMemfd = restored.guestMemfd?.rawValue
    strategy =
      restored.guestMemfd == .aheadOfTime
      ? RestoreStrategy.eager.rawValue : command.strategy.rawValue
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

  /// Takes in what is known at the end.
  mutating func finish(_ restored: RestoredGuest) {
    doneNanoseconds = MonotonicClock.nanoseconds - restored.startNanoseconds
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
    let faults = missingFaults + minorFaults + stageTwoFaults
    let how = guestMemfd.map { ", \($0)" } ?? ""
    print(
      "\(strategy) restore of \(image): \(Terminal.size(memoryBytes)) of \(backing) memory\(how)")
    row("guest", "\(guest), \(vcpus) vCPU\(vcpus == 1 ? "" : "s")")
    row("first instruction after", Terminal.duration(firstInstructionNanoseconds))
    row("done after", Terminal.duration(doneNanoseconds))
    row(
      "faults",
      "\(faults): \(missingFaults) missing, \(minorFaults) minor, \(stageTwoFaults) stage-2")
    row(
      "resolved by",
      "\(copiedPages) copy, \(continuedPages) continue, \(writtenPages) write, \(zeroPages) zero"
        + (populatedPages > 0 ? " (\(populatedPages) pages in bulk)" : "")
        + (broughtAlong > 0 ? " (\(broughtAlong) came along)" : ""))
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

  private func row(_ label: String, _ value: String) {
    print("  " + label.padding(toLength: 26, withPad: " ", startingAt: 0) + value)
  }
}
