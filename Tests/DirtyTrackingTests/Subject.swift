// SPDX-License-Identifier: Apache-2.0

import Glibc
import GuestMemory
import KVM
import LinuxSystem
import TestGuest
import TestSupport
import Testing

/// One test at a time: each has a guest that takes the machine for itself, and huge pages are
/// few.
@Suite(.serialized) enum DirtyTrackingTests {}

/// A way to track writes, the memory it is tried on, and what runs the guest.
struct TrackingCase: Sendable, CustomStringConvertible {
  let method: DirtyTrackingMethod
  let backing: MemoryBacking
  let kind: TestGuest.Kind

  var description: String {
    "\(method.rawValue)/\(backing)/\(kind == .kvm ? "KVM" : "process")"
  }

  static let backings: [MemoryBacking] = [.anonymous, .memfd, .hugetlb(.size2MiB)]

  /// Every combination that exists.
  static let all = DirtyTrackingMethod.allCases.flatMap { method in
    backings.flatMap { backing in
      TestGuest.Kind.allCases.compactMap { kind in
        let isOfKVM = method == .ring || method == .log
        return isOfKVM && kind == .process
          ? nil : TrackingCase(method: method, backing: backing, kind: kind)
      }
    }
  }

  /// Why this machine does not have it.
  var unavailability: String? {
    if kind == .kvm, !Host.hasKVM { return "no usable /dev/kvm" }
    if case .hugetlb = backing, !Host.hasHugePages(64) { return "needs 64 free 2 MiB pages" }
    switch method {
    case .ring, .log: return method.unavailabilityInKVM
    case .writeProtect, .async:
      guard Host.hasPrivileges else { return "needs root to watch the kernel's faults" }
      return method.userfaultUnavailability(for: backing)
    }
  }

  /// 4 KiB pages that one write marks: a huge page is written as a whole, KVM splits it.
  var unit: Int { method == .ring || method == .log ? 1 : backing.pageSize.bytes / 4096 }

  /// Pages from here on are written by workloads alone: before them lie the guest's tables,
  /// stacks and counters.
  var firstQuietPage: Int { max(256, unit) }

  /// What a write to some pages marks.
  func rounded(_ pages: Range<Int>) -> Range<Int> {
    pages.lowerBound / unit * unit..<(pages.upperBound + unit - 1) / unit * unit
  }
}

extension DirtyTrackingMethod {
  fileprivate var unavailabilityInKVM: String? {
    guard let capabilities = try? KVMSystem().capabilities() else { return "KVM cannot be asked" }
    let isThere =
      self == .ring
      ? capabilities.dirtyRingEntries >= Subject.ringEntries
      : capabilities.manualDirtyLogProtect.contains(.enable)
    return isThere ? nil : "KVM here has no dirty \(rawValue)"
  }
}

/// What this machine has of them.
let cases = TrackingCase.all.filter { $0.unavailability == nil }

/// The same with userfaultfd's synchronous write protection only.
let writeProtectCases = cases.filter { $0.method == .writeProtect }

/// A guest whose memory can be tracked. It ends before its memory goes.
final class Subject: Sendable {
  static let ringEntries = 1024

  let kind: TrackingCase
  let memory: GuestMemoryObject
  let guest: TestGuest
  var range: HostRange { memory.range }
  var pageCount: Int { memory.range.length / 4096 }

  init(_ kind: TrackingCase, mebibytes: Int = 16, vcpus: Int = 1, fill: Bool = true) throws {
    self.kind = kind
    memory = try GuestMemoryObject(backing: kind.backing, length: mebibytes << 20)
    let handle =
      kind.kind == .kvm && kind.method == .ring
      ? try GuestMachineHandle(dirtyRingEntries: Self.ringEntries) : nil
    guest = try TestGuest(booting: memory.range, vcpus: vcpus, kind: kind.kind, handle: handle)
    if fill { _ = try guest.run(.fill(seed: 3)) }
  }

  deinit { guest.shutdown() }

  func track(_ hook: WriteProtectTracking.WriteHook? = nil) throws -> any DirtyTracking {
    try guest.makeDirtyTracking(kind.method, backing: kind.backing, willWrite: hook)
  }

  /// Has the guest write the first bytes of some pages, all with other content than before.
  func write(_ pages: Range<Int>, seed: UInt64) throws {
    _ = try guest.run(.dirty(seed: seed, generations: 1), WorkloadOptions(pages: pages))
  }

  /// Writes ranges of pages; the bitmap must then hold them and nothing else among those
  /// that only workloads write.
  func expectExact(
    _ tracker: any DirtyTracking, writing ranges: [Range<Int>], seed: UInt64,
    location: SourceLocation = #_sourceLocation
  ) throws {
    for pages in ranges { try write(pages, seed: seed) }
    var expected = DirtyBitmap(pageCount: pageCount)
    for pages in ranges { expected.insert(kind.rounded(pages)) }
    expected.remove(0..<kind.firstQuietPage)
    var found = try tracker.collect()
    for pages in ranges {
      #expect(found.count(in: pages) == pages.count, "\(pages) lost", sourceLocation: location)
    }
    found.remove(0..<kind.firstQuietPage)
    #expect(Array(found.ranges) == Array(expected.ranges), sourceLocation: location)
  }
}

/// A copy of guest memory that follows what a tracker reports.
final class Mirror {
  private let copy: Mapping
  private let source: HostRange

  init(of source: HostRange) throws {
    copy = try Mapping(anonymous: source.length)
    self.source = source
    update(0..<source.length / 4096)
  }

  func update(_ pages: Range<Int>) {
    // SAFETY: both have these pages. The guest may write meanwhile: then the tracker has to
    // report the page again.
    unsafe (copy.pointer + pages.lowerBound * 4096).copyMemory(
      from: pointer(pages.lowerBound), byteCount: pages.count * 4096)
  }

  func update(_ bitmap: DirtyBitmap) {
    for pages in bitmap.ranges { update(pages) }
  }

  /// Pages that differ from the source.
  var differences: [Int] {
    (0..<source.length / 4096).filter { page in
      // SAFETY: both have this page.
      unsafe memcmp(copy.pointer + page * 4096, pointer(page), 4096) != 0
    }
  }

  @unsafe private func pointer(_ page: Int) -> UnsafeRawPointer {
    // SAFETY: a mapped range does not begin at address zero.
    unsafe UnsafeRawPointer(bitPattern: UInt(source.start.rawValue) + UInt(page * 4096))
      .unsafelyUnwrapped
  }
}
