// SPDX-License-Identifier: Apache-2.0

import Foundation
import GuestMemory
import LinuxSystem
import MemoryImage
import Pager
import SystemPackage
import TestSupport
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
