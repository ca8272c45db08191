// SPDX-License-Identifier: Apache-2.0

import Foundation
import GuestMemory
import KVM
import LinuxSystem
import MemoryImage
import Snapshot
import SnapshotRestore
import SystemPackage
import TestGuest

/// The guest of `faultline snapshot`: filled, writing, and saved.
final class SnapshotSubject {
  /// What filling it took.
  struct Filled {
    let pages: UInt64
    let nanoseconds: UInt64
    /// Pages that it writes to afterwards.
    let writing: Range<Int>?
  }

  private static let batch = 256
  private let command: SnapshotCommand
  private let memory: GuestMemoryHandle
  let guest: TestGuest
  private let usesRings: Bool

  init(_ command: SnapshotCommand) throws {
    self.command = command
    let kind = try command.guest.resolve()
    let (length, backing) = (command.memory.bytes, command.memoryOptions.backing)
    do throws(Errno) {
      memory = GuestMemoryHandle(try GuestMemoryObject(backing: backing, length: length))
    } catch {
      throw CommandFailure("\(Terminal.size(length)) of \(backing) memory cannot be had: \(error)")
    }
    // Rings replace the log, and are asked for when the machine is made.
    let wanted = command.tracking ?? (kind == .kvm ? .ring : .async)
    let entries = try KVMSystem.ringEntries(kind)
    usesRings = command.increments > 0 && wanted == .ring && entries > 0
    guest = try TestGuest(
      booting: memory.range, vcpus: command.vcpus, kind: kind,
      handle: usesRings ? try GuestMachineHandle(dirtyRingEntries: entries) : nil)
  }

  func fill() throws -> Filled {
    var options = WorkloadOptions()
    let first = (1 << 20) / 4096
    if let fill = command.fill {
      options.pages = first..<min(first + fill.bytes / 4096, command.memory.bytes / 4096)
    }
    let report = try guest.run(.fill(seed: command.seed), options)
    return Filled(
      pages: report.pages, nanoseconds: report.elapsedNanoseconds, writing: writtenPages)
  }

  /// The pages that the guest writes to while it is saved.
  private var writtenPages: Range<Int>? {
    let share = command.writes ?? (command.live ? 100 : command.increments > 0 ? 1 : 0)
    let first = (1 << 20) / 4096
    var last = command.memory.bytes / 4096
    if let fill = command.fill { last = min(last, first + fill.bytes / 4096) }
    let count = Int(Double(last - first) * share / 100)
    return count > 0 ? first..<first + count : nil
  }

  func startWriting() throws {
    try guest.start(
      .dirty(seed: command.seed), WorkloadOptions(pages: writtenPages, batch: Self.batch))
  }

  func makeSnapshotter() throws -> Snapshotter {
    let subject = TestGuestSnapshots(guest, memory)
    guard command.increments > 0 else { return Snapshotter(subject) }
    // Without rings the log is next; live snapshots need one of KVM's.
    let tracker = try guest.makeDirtyTracking(command.tracking, backing: memory.backing)
    return Snapshotter(subject, tracking: tracker)
  }

  // MARK: - One image

  func take(
    _ number: Int, of filled: Filled, with snapshotter: Snapshotter
  ) throws -> SnapshotResult {
    let path = Self.path(command.output, number)
    var options = SnapshotOptions(
      number == 0 ? .full : .incremental,
      image: ImageOptions(
        encoding: command.level == 0 ? .stored : .zstd(level: command.level)))
    options.metadata = metadata()
    let progress = ProgressLine("snapshot")
    defer { progress.finish() }
    options.progress = progress.callback
    let before = command.live && writtenPages != nil ? measureRate(seconds: 0.2) : nil
    let start = (MonotonicClock.nanoseconds, guest.batches)
    let report =
      command.live
      ? try snapshotter.takeLive(to: FilePath(path), options)
      : try snapshotter.take(
        to: FilePath(path), options,
        leavesPaused: number == command.increments && writtenPages == nil)
    let during = rate(since: start)
    progress.finish()
    return SnapshotResult(
      image: path, guest: guest.kind == .kvm ? "kvm" : "process",
      memoryBytes: memory.range.length, filled: filled, isLive: command.live,
      isIncremental: options.extent == .incremental, tracking: snapshotter.trackingMethod?.rawValue,
      imageBytes: try Self.size(of: path), report: report, pagesPerSecondBefore: before,
      pagesPerSecondDuring: before == nil ? nil : during)
  }

  private func metadata() -> [String: String] {
    var metadata = ["guest.seed": String(command.seed), "faultline.version": "0.1.0"]
    if let fill = command.fill {
      let first = (1 << 20) / 4096
      metadata["guest.filled"] =
        "\(first)..<\(min(first + fill.bytes / 4096, command.memory.bytes / 4096))"
    }
    if writtenPages != nil { metadata["guest.workload"] = "dirty" }
    return metadata
  }

  /// guest.img, guest.1.img, guest.2.img ...
  private static func path(_ output: String, _ number: Int) -> String {
    guard number > 0 else { return output }
    let path = FilePath(output)
    guard let name = path.lastComponent, let ending = name.extension else {
      return "\(output).\(number)"
    }
    return path.removingLastComponent().appending("\(name.stem).\(number).\(ending)").string
  }

  private static func size(of path: String) throws -> Int {
    (try FileManager.default.attributesOfItem(atPath: path)[.size] as? Int) ?? 0
  }

  // MARK: - How fast the guest writes

  private func measureRate(seconds: Double) -> Double {
    let start = (MonotonicClock.nanoseconds, guest.batches)
    Thread.sleep(forTimeInterval: seconds)
    return rate(since: start)
  }

  private func rate(since start: (time: UInt64, batches: UInt64)) -> Double {
    let seconds = Double(MonotonicClock.nanoseconds - start.time) / 1e9
    return Double(guest.batches - start.batches) * Double(Self.batch) / seconds
  }
}

extension KVMSystem {
  /// Entries for the dirty ring of each vCPU, 0 where there are no rings.
  fileprivate static func ringEntries(_ kind: TestGuest.Kind) throws -> Int {
    guard kind == .kvm else { return 0 }
    return min(8192, try KVMSystem().capabilities().dirtyRingEntries)
  }
}
