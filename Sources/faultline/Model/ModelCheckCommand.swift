// SPDX-License-Identifier: Apache-2.0

import ArgumentParser
import Foundation
import GuestMemoryModel
import LinuxSystem
import ModelCheck
import Userfault

/// Random steps on the model and on the kernel.
struct ModelCheckCommand: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "check",
    abstract: "Compare the model with this machine's kernel, step by step.",
    discussion: """
      Takes the same random steps on both and compares every return value, errno, event and
      page content. A disagreement is printed with its seed and the shortest list of steps
      that shows it. hugetlb needs \(hugePages) free 2 MiB pages and is left out where they are
      missing. guest_memfd is compared in the lab (./lab).

      faultline model check
      faultline model check --memory tmpfs --operations 1000000 --seed 7

      Exit status: 0 they agree; 1 they do not, or the check could not run.
      """)

  /// What can be compared here.
  enum Memory: String, ExpressibleByArgument, CaseIterable {
    case anonymous
    case anonymousWP = "anonymous-wp-unpopulated"
    case tmpfs
    case tmpfsPrivate = "tmpfs-private"
    case hugetlb
  }

  private static let hugePages = 16

  @Option(help: ArgumentHelp("The kind of memory; more than once for several.", valueName: "kind"))
  var memory: [Memory] = []
  @Option(help: ArgumentHelp("Steps for each kind.", valueName: "count"))
  var operations = 20_000
  @Option(help: ArgumentHelp("The seed of the first sequence of 250 steps.", valueName: "number"))
  var seed: UInt64 = 1
  @Flag(help: "Print one JSON object a line.")
  var json = false

  private struct Line: Encodable {
    let memory: String
    let kernel: String
    let operations: Int
    let waits: Int
    let differences: Int
    let seconds: Double
  }

  func validate() throws {
    guard operations > 0 else { throw ValidationError("--operations must be at least 1") }
  }

  func run() throws {
    let features: UserfaultFeatures
    do {
      features = try Userfaultfd.supportedFeatures()
    } catch {
      throw CommandFailure(
        "userfaultfd cannot be used here: \(error). `faultline doctor` says why.")
    }
    // 7.3 refuses a registration that drops WP; read-write-protect tells them apart.
    let kernel: KernelVariant = features.contains(.readWriteProtect) ? .linux7_3 : .linux6_18
    for memory in self.memory.isEmpty ? Memory.allCases : self.memory {
      if memory == .hugetlb, DoctorReport.freeHugePages(.size2MiB) < Self.hugePages {
        let text = "hugetlb needs \(Self.hugePages) free 2 MiB pages; `faultline doctor` says how"
        if !self.memory.isEmpty { throw CommandFailure(text) }
        Terminal.note("left out: \(text)")
        continue
      }
      let setup = memory.setup(kernel)
      let report: Differential.Report
      let start = MonotonicClock.nanoseconds
      let progress = ProgressLine(memory.rawValue, unit: .count)
      do {
        let source = try SourcePages(pages: setup.mappingPages, pageBytes: setup.pageBytes)
        report = try Differential(setup) { try KernelSubject($0, source: source) }
          .run(operations: operations, seed: seed, progress: progress.callback)
        progress.finish()
      } catch {
        progress.finish()
        throw CommandFailure(
          "the check of \(memory.rawValue) memory cannot run: \(error)")
      }
      let seconds = Double(MonotonicClock.nanoseconds - start) / 1e9
      let line = Line(
        memory: memory.rawValue, kernel: kernel.name, operations: report.operations,
        waits: report.waits, differences: report.disagreement == nil ? 0 : 1, seconds: seconds)
      if json {
        try Terminal.printJSON(line)
      } else {
        print(
          "\(line.memory): \(line.operations) operations, \(line.waits) faults that waited, "
            + "\(line.differences) differences, \(Int(Double(line.operations) / seconds)) per second"
        )
        fflush(nil)
      }
      if let disagreement = report.disagreement {
        throw CommandFailure("model and kernel disagree.\n\(disagreement)")
      }
    }
  }
}

extension ModelCheckCommand.Memory {
  fileprivate func setup(_ kernel: KernelVariant) -> Setup {
    switch self {
    case .anonymous: Setup(.anonymous, kernel: kernel)
    case .anonymousWP: Setup(.anonymous, kernel: kernel, protectsUnpopulated: true)
    case .tmpfs: Setup(.tmpfsShared, kernel: kernel)
    case .tmpfsPrivate: Setup(.tmpfsPrivate, kernel: kernel)
    case .hugetlb: Setup(.hugetlb, kernel: kernel, objectPages: 4)
    }
  }
}
