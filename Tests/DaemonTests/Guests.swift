// SPDX-License-Identifier: Apache-2.0

import Foundation
import HandoverClient
import HandoverProtocol
import LinuxSystem
import MemoryImage
import SystemPackage
import TestSupport
import Testing
import Userfault

/// Hands over the memory of a VMM in this process.
func attach(
  _ service: Service, _ vmm: FakeFirecracker, name: String? = nil, image: String? = nil,
  options: AttachMessage.Options? = nil
) throws -> HandoverClient {
  var offset: UInt64 = 0
  let regions = vmm.ranges.map { range in
    defer { offset += UInt64(range.length) }
    return AttachMessage.Region(
      hostAddress: range.start.rawValue, length: UInt64(range.length), offset: offset)
  }
  return try HandoverClient(
    attachingTo: FilePath(service.socket), regions: regions, userfaultfd: vmm.userfaultfd,
    name: name, image: image, options: options, timeoutMilliseconds: 60_000)
}

/// An image of two regions of 512 blocks, in which one block is damaged.
func makeDamagedImage(_ path: String, block: Int) throws {
  _ = try makePatternImage(path, regions: imageRegions([512, 512]), encoding: .stored)
  let file = try FileHandle(forUpdating: URL(fileURLWithPath: path))
  // The word of the block, wherever it is.
  let value = PatternSource.word(block: block, seed: 7)
  let word = Data((0..<8).map { UInt8(truncatingIfNeeded: value >> ($0 * 8)) })
  let content = try #require(try file.readToEnd())
  let place = try #require(content.firstRange(of: word + word))
  try file.seek(toOffset: UInt64(place.lowerBound))
  try file.write(contentsOf: Data([1, 2, 3]))
  try file.close()
}

/// What a guest finds in its pages: the right content, or a memory error; `nil` when anything else
/// is in one of them.
func pagesInMemory(_ vmm: FakeFirecracker) -> (right: Int, errors: Int)? {
  var (right, errors, block) = (0, 0, 0)
  for range in vmm.ranges {
    for offset in stride(from: 0, to: range.length, by: 4096) {
      switch guardedLoad(range, offset: offset) {
      case .value(PatternSource.word(block: block, seed: 7)): right += 1
      case .busError: errors += 1
      default: return nil
      }
      block += 1
    }
  }
  return (right, errors)
}
