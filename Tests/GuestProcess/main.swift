// SPDX-License-Identifier: Apache-2.0

// A process whose memory another process serves: for tests that kill it, or that serve
// it over a descriptor. Usage: guest-process SOCKET PAGES THREADS [gives-back | forks N DEPTH]
// With gives-back it reads pages and drops them (MADV_DONTNEED) until it is killed. With forks it
// forks N children (or children of their children), says so, and has them read the memory at the
// next message; it answers with the words that were zero and the children that were lost.

import GuestMemory
import LinuxSystem
import Pager
import Synchronization
import SystemPackage
import TestSupport
import Userfault

let arguments = CommandLine.arguments
guard (4...7).contains(arguments.count), let pages = Int(arguments[2]),
  let threads = Int(arguments[3])
else {
  fatalError("usage: guest-process SOCKET PAGES THREADS [gives-back]")
}
let socket = try UnixSocket(connectingTo: FilePath(arguments[1]))
let memory = try GuestMemoryObject(backing: .anonymous, length: pages * 4096)
let forks =
  arguments.count == 7 ? (count: Int(arguments[5]) ?? 0, depth: Int(arguments[6]) ?? 0) : nil
let userfaultfd = try Userfaultfd(
  wanting: PagerSession<PatternSource>.features.wanted.union(forks == nil ? [] : .forkEvents))
try userfaultfd.register(memory.range, modes: .missing)
let hello = "\(memory.range.start.rawValue) \(userfaultfd.features.rawValue)"
try socket.send(Array(hello.utf8), descriptors: [userfaultfd.descriptor.rawValue])
// The other side answers when it serves.
_ = try socket.receive(limit: 1)

if let forks, let readers = ForkedReaders() {
  // Children of a mapping that has no page of its own do not get its poison markers (mm/memory.c,
  // vma_needs_copy), and one that was let go of may fork.
  _ = load(memory.range, offset: 0)
  for _ in 0..<forks.count { readers.fork(memory.range, depth: forks.depth) }
  try socket.send(Array("forked".utf8))
  _ = try socket.receive(limit: 1)
  let (zeros, lost) = readers.read()
  try socket.send(Array("\(zeros) \(lost)".utf8))
}

let wrong = Atomic<Int>(0)
let range = memory.range
if arguments.count == 5 {
  try inThreads(threads) { thread in
    var random = SeededRandom(seed: UInt64(thread))
    while true {
      let part = random.part(of: 0..<pages, atMost: 16)
      for block in part { _ = load(range, offset: block * 4096) }
      try? memory.mapping.advise(
        .dontNeed, offset: part.lowerBound * 4096, length: part.count * 4096)
    }
  }
}
try inThreads(threads) { thread in
  for index in 0..<pages {
    let block = (index &* 7 &+ thread &* 31) % pages
    if load(range, offset: block * 4096) != PatternSource.word(block: block, seed: 7) {
      wrong.wrappingAdd(1, ordering: .relaxed)
    }
  }
}
try socket.send(Array("\(wrong.load(ordering: .relaxed))".utf8))
// The process is there until the other side has no more use for it.
_ = try? socket.receive(limit: 1)
withExtendedLifetime(memory) {}
