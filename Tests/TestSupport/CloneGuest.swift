// SPDX-License-Identifier: Apache-2.0

import HandoverClient
package import HandoverProtocol
package import LinuxSystem
import Synchronization
import SystemPackage
package import Userfault

/// A clone of a pattern image in this process, served over docs/handover.md.
package final class CloneGuest: Sendable {
  private final class Region: Sendable {
    let mapping: Mapping
    init(_ mapping: consuming Mapping) { self.mapping = mapping }
  }

  package let userfaultfd: Userfaultfd
  package let pageSize: PageSize
  private let regions: [Region]
  /// Empty once it has left.
  private let client: Mutex<HandoverClient?>
  /// What the guest wrote, by block; zero for what it gave back.
  private let written = Mutex<[Int: UInt64]>([:])

  /// Opens an image, maps it, and attaches.
  package init(
    _ socket: String, image: String? = nil, name: String? = nil, pageSize: PageSize = .size4KiB,
    options: AttachMessage.Options? = nil
  ) throws {
    let opened = try OpenedImage(
      from: FilePath(socket), image: image, name: name, pageSize: pageSize,
      timeoutMilliseconds: 60_000)
    let userfaultfd = try Userfaultfd(requiring: .removeEvents)
    var attached: [AttachMessage.Region] = []
    var regions: [Region] = []
    for region in opened.regions {
      let mapped = Region(try region.makeMapping())
      try userfaultfd.register(mapped.mapping.range, modes: [.missing, .minor])
      attached.append(region.attached(at: mapped.mapping.range.start))
      regions.append(mapped)
    }
    self.regions = regions
    self.pageSize = pageSize
    client = Mutex(
      try opened.attach(
        attached, userfaultfd: userfaultfd, options: options, timeoutMilliseconds: 60_000))
    self.userfaultfd = userfaultfd
  }

  package var ranges: [HostRange] { regions.map { region in region.mapping.range } }

  /// Blocks of 4 KiB in all regions.
  package var blocks: Int { ranges.reduce(0) { $0 + $1.length / 4096 } }

  /// Closes the connection; the memory stays.
  package func leave() { client.withLock { $0 = nil } }

  private func place(of block: Int) -> (region: Region, offset: Int) {
    var offset = block * 4096
    for region in regions {
      if offset < region.mapping.length { return (region, offset) }
      offset -= region.mapping.length
    }
    fatalError("there is no block \(block)")
  }

  /// What is to be in a block.
  package func expected(_ block: Int) -> UInt64 {
    written.withLock { $0[block] } ?? PatternSource.word(block: block, seed: 7)
  }

  package func word(_ block: Int) -> UInt64 {
    let place = place(of: block)
    return load(place.region.mapping.range, offset: place.offset)
  }

  package func guardedWord(_ block: Int) -> GuardedValue {
    let place = place(of: block)
    return guardedLoad(place.region.mapping.range, offset: place.offset)
  }

  package func write(_ value: UInt64, _ block: Int) {
    let place = place(of: block)
    store(value, place.region.mapping.range, offset: place.offset)
    written.withLock { $0[block] = value }
  }

  /// Gives the page of a block back (MADV_DONTNEED); returns when the service has read that.
  package func giveBack(_ block: Int) throws {
    let place = place(of: block)
    let start = place.offset / pageSize.bytes * pageSize.bytes
    try place.region.mapping.advise(.dontNeed, offset: start, length: pageSize.bytes)
    let first = block - (place.offset - start) / 4096
    written.withLock { written in
      for block in first..<first + pageSize.bytes / 4096 { written[block] = 0 }
    }
  }

  /// Touches blocks from several threads; how many are not as expected.
  package func wrongBlocks(_ range: Range<Int>? = nil, threads: Int = 2) throws -> Int {
    let range = range ?? 0..<blocks
    let wrong = Atomic<Int>(0)
    try inThreads(threads) { thread in
      for index in range.indices {
        let block = range.lowerBound + (index &* 7 &+ thread &* 31) % range.count
        if self.word(block) != self.expected(block) { wrong.wrappingAdd(1, ordering: .relaxed) }
      }
    }
    return wrong.load(ordering: .relaxed)
  }
}
