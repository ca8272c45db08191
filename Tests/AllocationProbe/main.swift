// SPDX-License-Identifier: Apache-2.0

// Serves faults from an image and prints how many allocations that took, all threads of
// the process together. Usage:
// allocation-probe missing|minor THREADS LEVEL AROUND PAGES IMAGE; PAGES of index and chunk table
// are kept in memory.

import CAllocationCount
import GuestMemory
import LinuxSystem
import MemoryImage
import Pager
import SystemPackage
import TestSupport
import Userfault

let arguments = CommandLine.arguments
guard arguments.count == 7, let mode = ResolutionMode(rawValue: arguments[1]),
  let threads = Int(arguments[2]), let level = Int(arguments[3]), let around = Int(arguments[4]),
  let cachedPages = Int(arguments[5])
else { fatalError("usage: allocation-probe missing|minor THREADS LEVEL AROUND PAGES IMAGE") }
let blocks = 4096
let path = FilePath(arguments[6])

let content = try GuestMemoryObject(backing: .anonymous, length: blocks * 4096)
for block in 0..<blocks where block % 8 != 7 {
  store(UInt64(block) + 1, content.range, offset: block * 4096)
}
func writeImage() throws {
  let writer = try ImageWriter(
    path: path,
    regions: [
      ImageRegion(
        name: "ram", guestAddress: GuestAddress(0), length: blocks * 4096, pageSize: .size4KiB)
    ], options: ImageOptions(encoding: level == 0 ? .stored : .zstd(level: level)))
  // SAFETY: the mapping is this long, and nobody else writes to it.
  try unsafe writer.write(
    region: 0, firstBlock: 0,
    bytes: UnsafeRawBufferPointer(start: content.mapping.pointer, count: blocks * 4096))
  try writer.finish()
}
try writeImage()

let memory = try GuestMemoryObject(
  backing: mode == .minor ? .memfd : .anonymous, length: blocks * 4096)
var options = PagerOptions(faultThreads: threads)
options.faultAround = .upTo(bytes: around)
let session = try PagerSession(
  userfaultfd: try Userfaultfd(wanting: PagerSession<ImageSource>.features.wanted),
  regions: [try PagedRegion(memory, mode: mode)],
  source: ImageSource(try MemoryImage(path: path, cachedPages: cachedPages)),
  options: options)
try session.start()
// Upwards, then back and forth, so that a few pages of the index are not enough. What is made on
// first use is made by the first half.
var sum: UInt64 = 0
@MainActor func touch(_ range: Range<Int>) {
  for block in range {
    let place = block < 64 || block % 2 == 0 ? block : blocks + 64 - block
    sum &+= load(memory.range, offset: place * 4096)
  }
}
touch(0..<2048)
let before = callocation_count()
touch(2048..<blocks)
let allocations = callocation_count() - before
session.release()
var expected: UInt64 = 0
for block in 0..<blocks where block % 8 != 7 { expected += UInt64(block) + 1 }
let deferred = session.statistics.deferredFaults
print(
  "deferred=\(deferred) faults=\(session.statistics.faults) allocations=\(allocations) right=\(sum == expected)"
)
