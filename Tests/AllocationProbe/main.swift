// SPDX-License-Identifier: Apache-2.0

// Serves faults from an image and prints how many allocations that took, all threads of
// the process together. Usage:
// allocation-probe missing|minor|clone THREADS LEVEL AROUND PAGES IMAGE; PAGES of index and chunk
// table are kept in memory. A clone's cache has to take its room from another one.

import CAllocationCount
import GuestMemory
import LinuxSystem
import MemoryImage
import Pager
import SystemPackage
import TestSupport
import Userfault

let arguments = CommandLine.arguments
let isClone = arguments.count == 7 && arguments[1] == "clone"
guard arguments.count == 7,
  let mode = isClone ? .missing : ResolutionMode(rawValue: arguments[1]),
  let threads = Int(arguments[2]), let level = Int(arguments[3]), let around = Int(arguments[4]),
  let cachedPages = Int(arguments[5])
else { fatalError("usage: allocation-probe missing|minor|clone THREADS LEVEL AROUND PAGES IMAGE") }
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

let budget = CacheBudget(limit: 10 << 20)
let cache = try SharedPageCache(length: blocks * 4096, budget: budget)
let memory =
  isClone
  ? GuestMemoryObject(cloneMapping: try cache.makeMapping(), pageSize: .size4KiB)
  : try GuestMemoryObject(
    backing: mode == .minor ? .memfd : .anonymous, length: blocks * 4096)
let region =
  isClone
  ? try PagedRegion(cloneOf: cache, host: memory.range) : try PagedRegion(memory, mode: mode)
var options = PagerOptions(faultThreads: threads)
options.faultAround = .upTo(bytes: around)
let session = try PagerSession(
  userfaultfd: try Userfaultfd(wanting: PagerSession<ImageSource>.features.wanted),
  regions: [region],
  source: ImageSource(try MemoryImage(path: path, cachedPages: cachedPages)),
  options: options)
try session.start()

/// A cache that is full of pages that no clone has.
func makeIdleCache() throws -> SharedPageCache {
  let cache = try SharedPageCache(length: blocks * 4096, budget: budget)
  let mapping = try cache.makeMapping()
  let session = try PagerSession(
    userfaultfd: try Userfaultfd(wanting: PagerSession<PatternSource>.features.wanted),
    regions: [try PagedRegion(cloneOf: cache, host: mapping.range)], source: PatternSource())
  try session.start()
  for block in 0..<blocks { _ = load(mapping.range, offset: block * 4096) }
  session.release()
  return cache
}
let idle = isClone ? try makeIdleCache() : nil
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
if let idle, idle.evictedPages < 1000 { fatalError("room was made \(idle.evictedPages) times") }
session.release()
var expected: UInt64 = 0
for block in 0..<blocks where block % 8 != 7 { expected += UInt64(block) + 1 }
let deferred = session.statistics.deferredFaults
print(
  "deferred=\(deferred) faults=\(session.statistics.faults) allocations=\(allocations) right=\(sum == expected)"
)
