// SPDX-License-Identifier: Apache-2.0

import Glibc
package import LinuxSystem
import Synchronization
package import SystemPackage
package import Userfault

/// The sending side of Firecracker's hand-over, as `docs/firecracker.md` has it: memory of
/// this process, registered MISSING, described by a JSON array that is put together by hand.
package final class FakeFirecracker: Sendable {
  /// How versions name the size of pages.
  package enum Naming: String, Sendable, CaseIterable {
    /// Before February 2024: not at all, pages have 4096 bytes.
    case none
    /// To March 2025: page_size_kib, in bytes.
    case kib
    /// Since then: both.
    case both
    /// What it says it will be.
    case size
  }

  /// What its memory is made of.
  package enum Memory: Sendable {
    /// Anonymous; pages are set aside when it is mapped.
    case reserved
    /// Anonymous, MAP_NORESERVE: as the real one has it.
    case unreserved
    /// A file, mapped MAP_PRIVATE|MAP_NORESERVE: one of `SmallHugePagePool`, which can be empty.
    case file(FilePath)
  }

  private final class Region: Sendable {
    let mapping: Mapping
    init(_ mapping: consuming Mapping) { self.mapping = mapping }
  }

  package let pageSize: PageSize
  package let naming: Naming
  package let userfaultfd: Userfaultfd
  private let regions: [Region]

  /// Memory of some regions, all of a length; nobody serves it yet.
  package init(
    regions count: Int, pages: Int, pageSize: PageSize = .size4KiB, naming: Naming = .both,
    memory: Memory = .reserved
  ) throws {
    // What Firecracker asks for, and no more.
    let userfaultfd = try Userfaultfd(requiring: .removeEvents)
    regions = try (0..<count).map { number in
      let region = Region(
        try Self.map(memory, offset: number, length: pages * pageSize.bytes, pageSize: pageSize))
      try userfaultfd.register(region.mapping.range, modes: .missing)
      return region
    }
    self.userfaultfd = userfaultfd
    self.pageSize = pageSize
    self.naming = naming
  }

  private static func map(
    _ memory: Memory, offset number: Int, length: Int, pageSize: PageSize
  ) throws -> Mapping {
    switch memory {
    case .file(let path):
      let file = try OwnedDescriptor(openingForUpdate: path)
      return try Mapping(of: file, offset: number * length, length: length, sharing: .private)
    case .reserved where pageSize != .size4KiB:
      return try Mapping(anonymousHugePages: length, pageSize: pageSize)
    case .unreserved where pageSize != .size4KiB:
      return try Mapping(anonymousHugePages: length, pageSize: pageSize, reserved: false)
    case .reserved, .unreserved:
      return try Mapping(anonymous: length)
    }
  }

  /// Where the regions lie; the memory file has them in this order.
  package var ranges: [HostRange] { regions.map { region in region.mapping.range } }

  /// Blocks of 4 KiB in all regions.
  package var blocks: Int { ranges.reduce(0) { $0 + $1.length / 4096 } }

  /// What it sends.
  package var message: String {
    var offset = 0
    let objects = ranges.map { range in
      defer { offset += range.length }
      return Self.object(
        address: range.start.rawValue, size: range.length, offset: offset,
        pageSize: pageSize.bytes, naming: naming)
    }
    return "[" + objects.joined(separator: ",") + "]"
  }

  /// One region in the words of a version.
  package static func object(
    address: UInt64, size: Int, offset: Int, pageSize: Int = 4096, naming: Naming = .both
  ) -> String {
    let sizes =
      switch naming {
      case .none: ""
      case .kib: ",\"page_size_kib\":\(pageSize)"
      case .both: ",\"page_size\":\(pageSize),\"page_size_kib\":\(pageSize)"
      case .size: ",\"page_size\":\(pageSize)"
      }
    return "{\"base_host_virt_addr\":\(address),\"size\":\(size),\"offset\":\(offset)\(sizes)}"
  }

  /// Hands over; in pieces of some bytes, the first of which carries the descriptor.
  package func send(on socket: borrowing UnixSocket, piece: Int = .max) throws {
    let bytes = Array(message.utf8)
    var sent = 0
    while sent < bytes.count {
      let end = piece < bytes.count - sent ? sent + piece : bytes.count
      try socket.send(
        Array(bytes[sent..<end]),
        descriptors: sent == 0 ? [userfaultfd.descriptor.rawValue] : [])
      sent = end
      if end < bytes.count { Delay.microseconds(200) }
    }
  }

  /// Touches every block from several threads; how many are not what `PatternSource` says
  /// of the memory file.
  package func wrongBlocks(threads: Int = 2) throws -> Int {
    let wrong = Atomic<Int>(0)
    let ranges = self.ranges
    let count = blocks
    let perRegion = count / ranges.count
    try inThreads(threads) { thread in
      for index in 0..<count {
        let block = (index &* 7 &+ thread &* 31) % count
        let value = load(ranges[block / perRegion], offset: block % perRegion * 4096)
        if value != PatternSource.word(block: block, seed: 7) {
          wrong.wrappingAdd(1, ordering: .relaxed)
        }
      }
    }
    return wrong.load(ordering: .relaxed)
  }

  /// Gives a page back, as the balloon does (MADV_DONTNEED): a REMOVE event. Returns when
  /// the handler has read it.
  package func giveBack(region: Int, page: Int) throws {
    try regions[region].mapping.advise(
      .dontNeed, offset: page * pageSize.bytes, length: pageSize.bytes)
  }

  /// The first word of a page.
  package func word(region: Int, page: Int) -> UInt64 {
    load(ranges[region], offset: page * pageSize.bytes)
  }
}
