// SPDX-License-Identifier: Apache-2.0

import ArgumentParser
import Foundation
import GuestMemory
import LinuxSystem
import MemoryImage
import Snapshot
import SnapshotRestore
import SystemPackage
import TestGuest

/// Fills a test guest and saves it.
struct SnapshotCommand: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "snapshot",
    abstract: "Fill the memory of a test guest and save the guest to an image.",
    discussion: """
      The image is complete or it is not there, also when the disk is full or the machine
      loses power. It replaces an image of the same name.

      faultline snapshot -o guest.img
      faultline snapshot -o guest.img --memory 4G --vcpus 2 --seed 42
      faultline snapshot -o guest.img --guest process        without /dev/kvm

      With --live the guest goes on, and writes to its memory as fast as it can: the image is
      its memory at one point in time, within a pause of a few milliseconds. With
      --increments images of what changed follow, each with the one before as its parent.

      faultline snapshot -o guest.img --live
      faultline snapshot -o guest.img --live --increments 3 --writes 1
      """)

  @Option(name: [.short, .long], help: "Where to write the image; increments are NAME.1.img ...")
  var output: String
  @Option(help: "Guest memory: 2M to 64G, a multiple of 2M.")
  var memory = MemorySize(bytes: 1 << 30)
  @Option(help: "Virtual processors, 1 to 64.")
  var vcpus = 1
  @Option(help: "What the content of the pages is derived from.")
  var seed: UInt64 = 1
  @Option(help: "Fill only this much from the first MiB on; the rest stays absent.")
  var fill: MemorySize?
  @Option(help: "Compression by zstd, 1 (fast) to 19 (small); 0 stores pages as they are.")
  var level = 1
  @Option(help: "What runs the guest: automatic, kvm or process.")
  var guest: GuestKind = .automatic
  @OptionGroup var memoryOptions: MemoryOptions
  @Flag(help: "Save the guest while it runs and writes.")
  var live = false
  @Option(help: "Incremental images to take after the first, 0 to 64.")
  var increments = 0
  @Option(help: "Seconds between two images.")
  var every = 0.5
  @Option(
    help: ArgumentHelp(
      """
      How much of its memory the guest writes to while images are taken, in percent. \
      (default: 100 with --live, 1 with --increments, else 0)
      """, valueName: "percent"))
  var writes: Double?
  @Option(
    help: ArgumentHelp(
      """
      How writes between images are found: ring, log, async or write-protect. (default: the \
      first that works here)
      """, valueName: "method"))
  var tracking: DirtyTrackingMethod?
  @Flag(help: "Print one JSON object for each image.")
  var json = false
  @Flag(help: .hidden)
  var hold = false

  func validate() throws {
    try validateGuest(memory: memory, vcpus: vcpus)
    guard (0...19).contains(level) else { throw ValidationError("--level must be 0 to 19") }
    guard memoryOptions.backing != .guestMemfd else {
      throw ValidationError(
        "--backing guest_memfd is for `faultline restore`; an image fits any kind of memory")
    }
    guard (0...64).contains(increments) else {
      throw ValidationError("--increments must be 0 to 64")
    }
    guard every >= 0, every <= 3600 else {
      throw ValidationError("--every must be 0 to 3600 seconds")
    }
    guard (0...100).contains(writes ?? 0) else {
      throw ValidationError("--writes must be 0 to 100 percent")
    }
    guard tracking == nil || increments > 0 else {
      throw ValidationError("--tracking is for --increments")
    }
    if live, increments > 0, let tracking, tracking == .async || tracking == .writeProtect {
      throw ValidationError(
        "--live and --tracking \(tracking.rawValue) would watch the same memory by userfaultfd; "
          + "use ring or log")
    }
  }

  func run() throws {
    let subject = try SnapshotSubject(self)
    defer { subject.guest.shutdown() }
    let filled = try subject.fill()
    if filled.writing != nil { try subject.startWriting() }
    let snapshotter = try subject.makeSnapshotter()
    for number in 0...increments {
      if number > 0 || filled.writing != nil { Thread.sleep(forTimeInterval: every) }
      let result = try subject.take(number, of: filled, with: snapshotter)
      if json { try Terminal.printJSON(result) } else { result.show(number) }
    }
    if hold { waitForReader() }
  }

  /// The demo kills this process here, guest and all. When it is killed itself, nobody
  /// reads standard output any more: poll(2) then says POLLERR.
  private func waitForReader() {
    var output = pollfd(fd: STDOUT_FILENO, events: 0, revents: 0)
    // SAFETY: one element, alive during the call.
    while unsafe poll(&output, 1, -1) <= 0 {}
  }
}
