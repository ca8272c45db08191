// SPDX-License-Identifier: Apache-2.0

import Foundation
import Glibc
import GuestMemory
import LinuxSystem
import MemoryImage
import Pager
import SystemPackage
import TestSupport
import Testing
import Userfault

@testable import VMMAdapters

/// A session over what was handed over.
func makeSession(
  _ ranges: [ContentRange], _ image: MemoryImage, userfaultfd: consuming Userfaultfd,
  process: consuming OwnedDescriptor, memoryFiles: [HandedMemoryFile?] = []
) throws -> PagerSession<ImageSource> {
  try PagerSession(
    userfaultfd: userfaultfd,
    regions: try ranges.map { range in try range.makePagedRegion(memoryFiles: memoryFiles) },
    source: ImageSource(image), registers: false, process: process)
}

/// A session for a hand-over of Firecracker's.
func makeSession(
  _ handover: consuming FirecrackerHandover, _ image: MemoryImage
) throws -> PagerSession<ImageSource> {
  let ranges = try ContentMap.ranges(of: handover.regions, in: image.regions)
  return try makeSession(
    ranges, image, userfaultfd: handover.userfaultfd, process: handover.process)
}

/// Limits that a socket's buffer has room for, so that a sender never waits.
let smallLimits = HandoverLimits(messageBytes: 32 << 10, regions: 100, timeoutMilliseconds: 60_000)

/// What the receiving side says of a message with descriptors whose sender closes after it;
/// `nil` when it takes it.
func refusal(
  of message: [UInt8], descriptors: [CInt], limits: HandoverLimits = smallLimits
) throws -> HandoverError? {
  let second = try sentAndClosed(message, descriptors: descriptors)
  do throws(HandoverError) {
    _ = try FirecrackerHandover.receive(on: second, limits: limits)
    return nil
  } catch {
    return error
  }
}

/// The end of a connection whose other end has sent something and closed.
func sentAndClosed(_ message: [UInt8], descriptors: [CInt]) throws -> UnixSocket {
  let pair = try UnixSocket.pair()
  let first = pair.first
  if !message.isEmpty { try first.send(message, descriptors: descriptors) }
  return pair.second
}

/// Memory at the addresses that messages in these tests name, registered MISSING and served by
/// nobody. One for the process: a mapping has one userfaultfd.
final class NamedMemory: Sendable {
  static let shared = Result { try NamedMemory() }
  /// Has EVENT_REMOVE.
  let userfaultfd: Userfaultfd

  private init() throws {
    userfaultfd = try Userfaultfd(requiring: .removeEvents)
    try map(0x1_0000..<0x20_0000)
    try map(0x20_0000..<0x40_0000, more: MAP_HUGETLB | 21 << 26)
    try map(0x1000_0000..<0x1010_0000)
    try map(0x4000_0000..<0x4001_0000)
    try map(0x8000_0000..<0x8000_0000 + 1535 * 4096)
  }

  private func map(_ addresses: Range<Int>, more: CInt = 0) throws {
    let fixed: CInt = 0x10_0000  // MAP_FIXED_NOREPLACE
    let flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | fixed | more
    // Another test may ask for a range at this moment (`Mapping.init(inaccessible:)`).
    try #require(
      Delay.until(seconds: 10) {
        // SAFETY: nothing is replaced, and nobody uses it but through the kernel.
        let place = unsafe mmap(
          UnsafeMutableRawPointer(bitPattern: addresses.lowerBound), addresses.count,
          PROT_READ | PROT_WRITE, flags, -1, 0)
        return unsafe place == UnsafeMutableRawPointer(bitPattern: addresses.lowerBound)
      })
    try userfaultfd.register(
      HostRange(start: HostAddress(UInt64(addresses.lowerBound)), length: addresses.count),
      modes: .missing)
  }
}
