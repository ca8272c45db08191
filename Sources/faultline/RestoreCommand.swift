// SPDX-License-Identifier: Apache-2.0

import ArgumentParser
import GuestMemory
import LinuxSystem
import MemoryImage
import Pager
import SnapshotRestore
import SystemPackage
import TestGuest

/// Runs a saved test guest again.
struct RestoreCommand: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "restore",
    abstract: "Run a saved test guest again, lazily, and let it verify its own memory.",
    discussion: """
      The guest runs at once. A page that it touches is read from the image, checked, and
      given to it; a page whose checksum fails is poisoned, and the guest is told.

      faultline restore guest.img
      faultline restore guest.img --backing memfd --faults minor --order random
      faultline restore guest.img --backing guest_memfd
      faultline restore guest.img --record                     what it touches, in which order
      faultline restore guest.img --strategy eager             all memory first, for comparison
      faultline restore guest.img --workload touch             touch every page once, timed
      faultline restore guest.img --handover /run/fl.sock      `faultline serve` has its memory
      """)

  enum Work: String, ExpressibleByArgument, CaseIterable { case verify, touch, none }
  enum Order: String, ExpressibleByArgument, CaseIterable { case sequential, random }

  @Argument(help: "An image that `faultline snapshot` wrote.", completion: .file())
  var image: String
  @Option(help: "lazy: pages come when they are touched; eager: all of them before the start.")
  var strategy: RestoreStrategy = .lazy
  @Option(help: "missing: UFFDIO_COPY; minor: page cache and UFFDIO_CONTINUE (shared memory).")
  var faults: ResolutionMode = .missing
  @OptionGroup var memoryOptions: MemoryOptions
  @Option(
    name: .customLong("guest-memfd"),
    help: "With --backing guest_memfd: three-way, two-way or ahead-of-time; else the best here.")
  var guestMemfd: GuestMemfdStrategy?
  @Option(help: "What the guest does: verify, touch or none.")
  var workload: Work = .verify
  @Option(help: "The order of its pages: sequential or random.")
  var order: Order = .sequential
  @Option(help: "Threads that serve faults, 1 to 64. One is best for one vCPU. (default: 1)")
  var faultThreads: Int?
  @Option(
    help: ArgumentHelp(
      "How much a fault brings along where the guest goes upwards, 0 for nothing. (default: 1M)",
      valueName: "size"))
  var faultAround: String?
  @Option(
    help: ArgumentHelp(
      "How long a page may take before it is given up, 100ms to 1h. (default: 30s)",
      valueName: "duration"))
  var sourceTimeout: SourceTimeout?
  @Option(
    help: """
      A page without right content: poison (a touch is a memory error), wait (who touches it \
      waits until this command is ended) or stop-vmm (a touch ends it). (default: poison)
      """)
  var onDamage: DamagePolicy?
  @Flag(help: "Remember the order in which the guest touches pages, and put it into the image.")
  var record = false
  @Flag(
    inversion: .prefixedNo,
    help: "Bring the image's working set, if it has one, while the guest starts.")
  var workingSet = true
  @OptionGroup var handover: HandoverArguments
  @Flag(help: "Print one JSON object.")
  var json = false

  func validate() throws {
    try handover.validate(with: self)
    guard (1...64).contains(faultThreads ?? 1) else {
      throw ValidationError("--fault-threads must be 1 to 64")
    }
    guard faultAroundBytes != nil else {
      throw ValidationError("--fault-around must be 0, or a size such as 256K or 1M")
    }
    guard guestMemfd == nil || memoryOptions.backing == .guestMemfd else {
      throw ValidationError("--guest-memfd needs --backing guest_memfd")
    }
    guard (onDamage ?? .poison) == .poison || memoryOptions.backing != .guestMemfd else {
      throw ValidationError("--on-damage can only be poison with --backing guest_memfd")
    }
  }

  private var faultAroundBytes: Int? {
    faultAround == "0" ? 0 : MemorySize(argument: faultAround ?? "1M")?.bytes
  }

  func run() throws {
    if let socket = handover.handover { try runHandedOver(to: socket) } else { try runWithPager() }
  }

  /// Serves the guest's memory in this process.
  private func runWithPager() throws {
    let progress = ProgressLine("restore")
    defer { progress.finish() }
    var options = RestoreOptions(
      backing: memoryOptions.backing, mode: faults, strategy: strategy,
      progress: progress.callback)
    if memoryOptions.backing == .guestMemfd {
      let (best, reason) = try GuestMemfdStrategy.probe()
      options.guestMemfd = guestMemfd ?? best
      if guestMemfd == nil { Terminal.note("faultline: guest_memfd \(best.rawValue): \(reason)") }
    }
    options.pager = PagerOptions(
      faultThreads: faultThreads ?? 1,
      onFailure: { Terminal.note("faultline: \($0)") },
      onEnd: { error in
        // Nobody will resolve the guest's faults any more: better no guest than a stuck one.
        Terminal.note("faultline: the pager has ended: \(error)")
        RestoreCommand.exit(withError: ExitCode(1))
      })
    options.pager.records = record
    options.pager.sourceTimeout = sourceTimeout?.nanoseconds ?? options.pager.sourceTimeout
    options.pager.onDamage = onDamage ?? .poison
    options.replaysWorkingSet = workingSet && !record
    options.pager.faultAround = .upTo(bytes: faultAroundBytes ?? 0)
    let restored = try RestoredGuest(FilePath(image), options)
    progress.finish()
    defer { restored.shutdown() }
    var report = try work(on: restored)
    report.finish(restored)
    if record {
      let runs = restored.session.recordedWorkingSet
      try restored.image.storeWorkingSet(runs)
      report.recordedPages = runs.reduce(0) { $0 + $1.blockCount }
    }
    try report.show(json: json)
    if !report.isRight { throw wrongPagesStatus }
  }

  /// Has the guest do what it is to do.
  func work(on restored: any RunningGuest) throws -> RestoreReport {
    var report = RestoreReport(restored, self)
    report.firstInstructionNanoseconds = try restored.timeToFirstInstruction()
    do throws(GuestError) {
      try runWorkload(on: restored, &report)
    } catch {
      report.guestError = error.description
    }
    report.doneNanoseconds = MonotonicClock.nanoseconds - restored.startNanoseconds
    return report
  }

  private func runWorkload(
    on restored: any RunningGuest, _ report: inout RestoreReport
  ) throws(GuestError) {
    let metadata = restored.image.metadata
    let seed = metadata["guest.seed"].flatMap { UInt64($0) } ?? 1
    var options = WorkloadOptions()
    let bounds = (metadata["guest.filled"] ?? "").split(separator: ".").compactMap {
      Int($0.filter(\.isNumber))
    }
    if bounds.count == 2, bounds[0] < bounds[1] { options.pages = bounds[0]..<bounds[1] }
    let pageOrder: PageOrder = order == .random ? .random : .sequential
    // A guest that was saved while it wrote goes on with that: what it had written decides
    // what its pages must hold.
    var dirtied: [DirtyRange] = []
    if workload != .none, metadata["guest.workload"] == "dirty" {
      restored.guest.stop()
      dirtied = try restored.guest.wait().dirtied
    }
    switch workload {
    case .none: break
    case .verify:
      let result = try restored.guest.run(
        .verify(seed: seed, order: pageOrder, dirtied: dirtied), options)
      report.verifiedPages = result.pages
      report.wrongPages = result.wrongPages
      report.firstWrongPage = result.firstWrongPage
    case .touch:
      let result = try restored.guest.run(.touch(order: pageOrder, timed: true), options)
      report.touched(result)
    }
  }
}
