// SPDX-License-Identifier: Apache-2.0

import ArgumentParser
import Foundation
import GuestMemory
import Pager
import TestGuest

/// The main job, end to end.
struct DemoCommand: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "demo",
    abstract: "Snapshot a guest, kill it, restore it in a new process, and verify it.",
    discussion: """
      A first process fills a guest, saves it and is killed. A second process restores it
      lazily, and the guest verifies every page itself; a third does the same with all memory
      filled in first. The image goes to a temporary directory that is removed again.

      faultline demo
      faultline demo --memory 4G --backing memfd --faults minor
      """)

  @Option(help: "Guest memory: 2M to 64G, a multiple of 2M.")
  var memory = MemorySize(bytes: 1 << 30)
  @Option(help: "Virtual processors, 1 to 64.")
  var vcpus = 1
  @Option(help: "missing: UFFDIO_COPY; minor: page cache and UFFDIO_CONTINUE (shared memory).")
  var faults: ResolutionMode = .missing
  @OptionGroup var memoryOptions: MemoryOptions
  @Option(help: "What runs the guest: automatic, kvm or process.")
  var guest: GuestKind = .automatic
  @Option(help: "Directory for the image; the default is TMPDIR or /tmp.", completion: .directory)
  var directory: String?

  func validate() throws { try validateGuest(memory: memory, vcpus: vcpus) }

  func run() throws {
    let kind = try guest.resolve() == .kvm ? "kvm" : "process"
    let parent = directory.map { URL(fileURLWithPath: $0) }
    let folder = (parent ?? FileManager.default.temporaryDirectory).appendingPathComponent(
      "faultline-demo-\(ProcessInfo.processInfo.processIdentifier)")
    do {
      try FileManager.default.createDirectory(at: folder, withIntermediateDirectories: false)
    } catch {
      throw CommandFailure("\(folder.path) cannot be made: \(error.localizedDescription)")
    }
    let cleanup = InterruptCleanup(folder)
    defer { cleanup.run() }

    let image = folder.appendingPathComponent("guest.img").path
    let size = memory.defaultValueDescription
    print("1. A \(Terminal.size(memory.bytes)) guest (\(kind)) fills its memory and is saved.")
    let saved = try Child.snapshot(
      [
        "snapshot", "-o", image, "--memory", size, "--vcpus", "\(vcpus)", "--guest", kind,
        "--backing", memoryOptions.backing.description, "--json", "--hold",
      ])
    print(
      "   filled in \(Terminal.duration(saved.fillNanoseconds)), saved in "
        + "\(Terminal.duration(saved.snapshotNanoseconds)); then its process was killed.")

    let arguments = [
      "restore", image, "--backing", memoryOptions.backing.description, "--faults",
      faults.rawValue, "--json",
    ]
    print("2. A new process restores it lazily; the guest verifies every page itself.")
    let lazy = try Child.restore(arguments)
    print("3. The same, with all memory filled in before the guest runs.")
    let eager = try Child.restore(arguments + ["--strategy", "eager"])
    show(lazy, eager)
    guard lazy.isRight, eager.isRight else { throw wrongPagesStatus }
  }

  private func show(_ lazy: RestoreReport, _ eager: RestoreReport) {
    func row(_ label: String, _ left: String, _ right: String) {
      print(
        "   " + label.padding(toLength: 30, withPad: " ", startingAt: 0)
          + left.padding(toLength: 22, withPad: " ", startingAt: 0) + right)
    }
    func time(_ value: UInt64?) -> String { value.map(Terminal.duration) ?? "-" }
    func counts(_ values: UInt64?...) -> String {
      values.map { "\($0 ?? 0)" }.joined(separator: " / ")
    }
    print("")
    row("", "lazy", "eager")
    row(
      "time to first instruction", time(lazy.firstInstructionNanoseconds),
      time(eager.firstInstructionNanoseconds))
    row("time to verified", time(lazy.doneNanoseconds), time(eager.doneNanoseconds))
    row(
      "faults: missing / minor", counts(lazy.missingFaults, lazy.minorFaults),
      counts(eager.missingFaults, eager.minorFaults))
    row(
      "pages: copy / continue / zero",
      counts(lazy.copiedPages, lazy.continuedPages, lazy.zeroPages),
      counts(eager.copiedPages, eager.continuedPages, eager.zeroPages))
    row("fault served, p50", time(lazy.serviceP50Nanoseconds), time(eager.serviceP50Nanoseconds))
    row("fault served, p99", time(lazy.serviceP99Nanoseconds), time(eager.serviceP99Nanoseconds))
    print("")
    for (name, report) in [("lazy", lazy), ("eager", eager)] {
      for page in report.damagedPages { print("\(name): \(page)") }
      if let error = report.guestError { print("\(name): \(error)") }
    }
    let wrong = (lazy.wrongPages ?? 0) + (eager.wrongPages ?? 0)
    print("guest verified: \(lazy.verifiedPages ?? 0) pages, \(wrong) wrong")
  }
}
