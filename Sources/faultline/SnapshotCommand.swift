// SPDX-License-Identifier: Apache-2.0

import ArgumentParser
import Foundation
import GuestMemory
import LinuxSystem
import MemoryImage
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
      """)

  @Option(name: [.short, .long], help: "Where to write the image.")
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
  @Flag(help: "Print one JSON object.")
  var json = false
  @Flag(help: .hidden)
  var hold = false

  struct Report: Encodable {
    let image: String
    let memoryBytes: Int
    let filledPages: UInt64
    let fillNanoseconds: UInt64
    let snapshotNanoseconds: UInt64
    let guest: String
  }

  func validate() throws {
    try validateGuest(memory: memory, vcpus: vcpus)
    guard (0...19).contains(level) else { throw ValidationError("--level must be 0 to 19") }
    guard memoryOptions.backing != .guestMemfd else {
      throw ValidationError(
        "--backing guest_memfd is for `faultline restore`; an image fits any kind of memory")
    }
  }

  func run() throws {
    let kind = try guest.resolve()
    let backing = memoryOptions.backing
    let object: GuestMemoryObject
    do throws(Errno) {
      object = try GuestMemoryObject(backing: backing, length: memory.bytes)
    } catch {
      throw CommandFailure(
        "\(Terminal.size(memory.bytes)) of \(backing) memory cannot be had: \(error)")
    }
    let testGuest = try TestGuest(booting: object.range, vcpus: vcpus, kind: kind)
    defer { testGuest.shutdown() }
    var options = WorkloadOptions()
    if let fill {
      let first = (1 << 20) / 4096
      options.pages = first..<min(first + fill.bytes / 4096, memory.bytes / 4096)
    }
    let filled = try testGuest.run(.fill(seed: seed), options)
    let start = MonotonicClock.nanoseconds
    let progress = ProgressLine("snapshot")
    defer { progress.finish() }
    var metadata = ["guest.seed": String(seed), "faultline.version": "0.1.0"]
    if let pages = options.pages {
      metadata["guest.filled"] = "\(pages.lowerBound)..<\(pages.upperBound)"
    }
    try GuestSnapshot.take(
      of: testGuest, memory: object, to: FilePath(output), skipsAbsentPages: true,
      metadata: metadata,
      options: ImageOptions(encoding: level == 0 ? .stored : .zstd(level: level)),
      progress: progress.callback)
    progress.finish()
    let report = Report(
      image: output, memoryBytes: memory.bytes, filledPages: filled.pages,
      fillNanoseconds: filled.elapsedNanoseconds,
      snapshotNanoseconds: MonotonicClock.nanoseconds - start,
      guest: kind == .kvm ? "kvm" : "process")
    if json {
      try Terminal.printJSON(report)
    } else {
      print(
        "\(output): \(Terminal.size(report.memoryBytes)) guest with \(report.filledPages) filled "
          + "pages, filled in \(Terminal.duration(report.fillNanoseconds)), saved in "
          + "\(Terminal.duration(report.snapshotNanoseconds))")
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
