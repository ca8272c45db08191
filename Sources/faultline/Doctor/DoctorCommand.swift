// SPDX-License-Identifier: Apache-2.0

import ArgumentParser
import Foundation

/// Says what works on this machine.
struct DoctorCommand: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "doctor",
    abstract: "Find out by trying what works on this machine, and how to get the rest.",
    discussion: """
      Tries userfaultfd, every kind of memory in every mode, KVM and huge pages. Changes
      nothing.

      faultline doctor
      faultline doctor --json

      Exit status: 0 a guest can be restored lazily here; 1 it cannot.
      """)

  @Flag(help: "Print one JSON object.")
  var json = false

  func run() throws {
    let report = DoctorReport()
    if json { try Terminal.printJSON(report) } else { show(report) }
    if !report.canRestoreLazily { throw ExitCode(1) }
  }

  private func show(_ report: DoctorReport) {
    print("kernel        Linux \(report.kernel), uid \(report.userID)")
    line("userfaultfd", report.systemCall == nil ? "system call" : nil, report.systemCall)
    line("", report.device == nil ? "/dev/userfaultfd" : nil, report.device)
    if !report.features.isEmpty { wrap("features", report.features) }
    let kvm = report.kvm
    line(
      "KVM",
      kvm.available
        ? "/dev/kvm\(kvm.isPVM ? " (KVM_PVM)" : ""), up to \(kvm.maximumVCPUs) vCPUs; dirty ring "
          + "\(kvm.dirtyRingEntries) entries; manual dirty-log protect "
          + "\(kvm.manualDirtyLogProtect ? "yes" : "no"); memory-fault exits "
          + "\(kvm.memoryFaultInfo ? "yes" : "no"); guest_memfd flags \(kvm.guestMemfdFlags ?? "-")"
        : nil, kvm.error)
    for pool in report.hugePages {
      print("huge pages    \(pool.pageSize): \(pool.free) free of \(pool.total)")
    }
    line(
      "guest_memfd",
      report.guestMemfd.strategy.map { "\($0): \(report.guestMemfd.reason)" },
      report.guestMemfd.reason)
    print("")
    print("memory × modes: which ioctls the kernel offers")
    for memory in report.memory {
      if let reason = memory.unavailable {
        print("  \(memory.kind): cannot be had here (\(reason))")
        continue
      }
      print("  \(memory.kind)")
      for mode in memory.modes {
        let name = mode.modes.joined(separator: "|").padding(
          toLength: 18, withPad: " ", startingAt: 0)
        print("    \(name)\(mode.operations?.joined(separator: " ") ?? "no: \(mode.error ?? "")")")
      }
    }
    if !report.advice.isEmpty { print("\nmissing, and how to get it") }
    for advice in report.advice {
      print("  \(advice.missing)\n    why: \(advice.why)\n    how: \(advice.how)")
    }
    print("")
    print(
      report.canRestoreLazily
        ? "Guests can be restored lazily here." : "Guests cannot be restored lazily here.")
  }

  private func line(_ label: String, _ works: String?, _ error: String?) {
    let name = label.padding(toLength: 14, withPad: " ", startingAt: 0)
    print(name + (works ?? "no: \(error ?? "unknown")"))
  }

  private func wrap(_ label: String, _ words: [String]) {
    var text = label.padding(toLength: 14, withPad: " ", startingAt: 0)
    var column = 14
    for word in words {
      if column + word.count > 96 {
        text += "\n" + String(repeating: " ", count: 14)
        column = 14
      }
      text += word + " "
      column += word.count + 1
    }
    print(text)
  }
}
