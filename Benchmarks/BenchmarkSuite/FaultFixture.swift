// SPDX-License-Identifier: Apache-2.0

import CMinimalHandler
import GuestMemory
import LinuxSystem
import MemoryImage
import Pager
import Snapshot
import SnapshotRestore
import SystemPackage
import TestGuest
import Userfault

/// A small guest in an image, and the same bytes in memory for the peer.
final class FaultFixture {
  static let memoryLength = 32 << 20

  let kind: TestGuest.Kind
  private let image: FilePath
  private let states: [[UInt8]]
  private let content: Mapping
  private let ticksPerMicrosecond = MonotonicClock.ticksPerNanosecond() * 1000

  init(kind: TestGuest.Kind) throws {
    self.kind = kind
    image = temporaryImage("fault")
    let memory = GuestMemoryHandle(
      try GuestMemoryObject(backing: .anonymous, length: Self.memoryLength))
    let guest = try TestGuest(booting: memory.range, kind: kind)
    defer { guest.shutdown() }
    _ = try guest.run(.fill(seed: 1))
    _ = try Snapshotter(TestGuestSnapshots(guest, memory)).take(
      to: image, SnapshotOptions(image: ImageOptions(encoding: .stored)), leavesPaused: true)
    states = try guest.saveState()
    let content = try Mapping(anonymous: Self.memoryLength)
    // SAFETY: the guest is paused; both mappings are this long.
    unsafe content.pointer.copyMemory(
      from: memory.object.mapping.pointer, byteCount: Self.memoryLength)
    self.content = content
  }

  func remove() { try? removeFile(image) }

  /// Restores with our pager and touches every page once, in a random order.
  func touchOurs(_ mode: ResolutionMode, _ pace: FaultPace) throws -> TouchTimes {
    let restored = try RestoredGuest(
      image, RestoreOptions(backing: mode == .minor ? .memfd : .anonymous, mode: mode))
    defer { restored.shutdown() }
    return try touch(restored.guest, pace)
  }

  /// The same with the minimal handler.
  func touchPeer(_ mode: ResolutionMode, _ pace: FaultPace) throws -> TouchTimes {
    let memory = try GuestMemoryObject(
      backing: mode == .minor ? .memfd : .anonymous, length: Self.memoryLength)
    let userfaultfd = try Userfaultfd(wanting: [.missingShmem, .minorShmem])
    try userfaultfd.register(
      memory.range, modes: mode == .minor ? [.missing, .minor] : .missing)
    let alias = try aliasMapping(of: memory)
    guard
      let handler = unsafe minimal_handler_start(
        userfaultfd.descriptor.rawValue, memory.range.start.rawValue,
        UInt64(Self.memoryLength), content.range.start.rawValue,
        alias.map { $0.mapping.range.start.rawValue } ?? 0)
    else { throw Errno.noMemory }
    defer {
      unsafe minimal_handler_stop(handler)
      withExtendedLifetime(alias) {}
    }
    let guest = try TestGuest(restoring: memory.range, states: states, kind: kind)
    defer { guest.shutdown() }
    return try touch(guest, pace)
  }

  private func touch(_ guest: TestGuest, _ pace: FaultPace) throws -> TouchTimes {
    let report = try guest.run(.touch(order: .random, timed: true), pace.options)
    return TouchTimes(samples: report.samples, ticksPerMicrosecond: ticksPerMicrosecond)
  }

  private final class Alias {
    let mapping: Mapping
    init(_ mapping: consuming Mapping) { self.mapping = mapping }
  }

  private func aliasMapping(of memory: borrowing GuestMemoryObject) throws -> Alias? {
    switch memory.file {
    case .none: return nil
    case .some(let file): return Alias(try Mapping(of: file))
    }
  }
}
