// SPDX-License-Identifier: Apache-2.0

import ArgumentParser
import GuestMemory
import LinuxSystem
import Pager
import SnapshotRestore
import SystemPackage

/// Where the memory of a restored guest comes from, if not from this process.
struct HandoverArguments: ParsableArguments {
  @Option(
    help: ArgumentHelp(
      "Have a service serve the memory: the socket of `faultline serve --handover faultline`.",
      valueName: "socket"),
    completion: .file())
  var handover: String?
  @Option(help: "With --handover: what the guest is called there.")
  var name: String?
  @Option(
    help: ArgumentHelp(
      "With --handover: the image to ask for, where the service has several.", valueName: "name"))
  var serviceImage: String?
  @Flag(
    help: """
      With --handover: share clean pages with the image's other clones there; what the guest \
      writes is its own. Pages of 4 KiB, or of 2 MiB with --backing hugetlb-2M.
      """)
  var clone = false

  /// Refuses what makes no sense with the other options.
  func validate(with command: RestoreCommand) throws {
    guard handover != nil else {
      guard name == nil, serviceImage == nil, !clone else {
        throw ValidationError("--name, --service-image and --clone need --handover")
      }
      return
    }
    let others = [
      ("--strategy eager", command.strategy == .eager, "set --fill-rate there"),
      ("--fault-threads", command.faultThreads != nil, "set it there"),
      ("--fault-around", command.faultAround != nil, "the service decides"),
      ("--source-timeout", command.sourceTimeout != nil, "set it there"),
      ("--on-damage", command.onDamage != nil, "set it there"),
      ("--record", command.record, "set it there"),
      ("--no-working-set", !command.workingSet, "the service decides"),
    ]
    guard !clone || command.faults == .missing else {
      throw ValidationError("--faults is not for --clone: it has its memory from the service")
    }
    for (option, isThere, advice) in others where isThere {
      throw ValidationError("\(option) is not for --handover: the service fills memory; \(advice)")
    }
    guard [.size4KiB, .size2MiB].contains(command.memoryOptions.backing.pageSize),
      command.memoryOptions.backing != .guestMemfd
    else {
      throw ValidationError(
        "--handover needs memory of 4 KiB or 2 MiB pages: anonymous, memfd or hugetlb-2M")
    }
  }
}

extension RestoreCommand {
  /// Hands the guest's memory over to a service.
  func runHandedOver(to socket: String) throws {
    var options = HandoverOptions(socket: FilePath(socket))
    options.backing = memoryOptions.backing
    options.mode = faults
    options.isClone = handover.clone
    options.name = handover.name
    options.serviceImage = handover.serviceImage
    options.onNotice = { Terminal.note("faultline: \(Terminal.plain($0))") }
    options.onEnd = { reason in
      // A vCPU that waits for a page cannot be told to end; the end of the process ends it.
      Terminal.note(
        "faultline: nobody serves the guest's memory any more, so it is ended. "
          + Terminal.plain(reason))
      RestoreCommand.exit(withError: ExitCode(1))
    }
    let restored = try HandedOverGuest(FilePath(image), options)
    defer { restored.shutdown() }
    var report = try work(on: restored)
    if !report.isRight { restored.awaitFailure() }
    // What was told meanwhile is known afterwards.
    restored.shutdown()
    report.finish(restored)
    try report.show(json: json)
    if !report.isRight { throw wrongPagesStatus }
  }
}
