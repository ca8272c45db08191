// SPDX-License-Identifier: Apache-2.0

import Foundation
import Glibc
import LinuxSystem
import Pager
import SystemPackage
import TestSupport
import Testing
import Userfault

@testable import VMMAdapters

@Suite("Firecracker hands over its memory")
struct FirecrackerTests {
  /// Hands over, serves, and checks every block and what was given back.
  func serve(
    regions: Int, pages: Int, pageSize: PageSize = .size4KiB,
    naming: FakeFirecracker.Naming = .both, piece: Int = .max, imageBlocks: [Int]? = nil
  ) throws {
    try withTemporaryDirectory { directory in
      let firecracker = try FakeFirecracker(
        regions: regions, pages: pages, pageSize: pageSize, naming: naming)
      let image = try makePatternImage(
        directory + "/image", regions: imageRegions(imageBlocks ?? [firecracker.blocks]))
      let pair = try UnixSocket.pair()
      let first = pair.first
      let second = pair.second
      let link = SocketBox(first)
      let sender = try ThreadHandle.start {
        do { try firecracker.send(on: link.socket, piece: piece) } catch { fatalError("\(error)") }
      }
      let handover = try FirecrackerHandover.receive(on: second)
      sender.join()
      #expect(handover.regions.map(\.host) == firecracker.ranges)
      #expect(handover.regions.allSatisfy { $0.pageSize == pageSize })
      let peer = handover.peer
      #expect(peer.processID == getpid() && peer.userID == geteuid())

      let session = try makeSession(handover, image)
      try session.start()
      #expect(try firecracker.wrongBlocks() == 0)
      for region in 0..<regions {
        try firecracker.giveBack(region: region, page: pages - 1)
        #expect(firecracker.word(region: region, page: pages - 1) == 0)
      }
      #expect(session.statistics.removeEvents >= UInt64(regions))
      session.release()
    }
  }

  @Test("Each version's names for the size of pages", arguments: FakeFirecracker.Naming.allCases)
  func namings(naming: FakeFirecracker.Naming) throws {
    try serve(regions: 2, pages: 64, naming: naming)
  }

  @Test("A message in pieces, down to single bytes", arguments: [1, 7, 100])
  func pieces(bytes: Int) throws { try serve(regions: 3, pages: 16, piece: bytes) }

  @Test("More regions than fit into one read")
  func manyRegions() throws { try serve(regions: 300, pages: 2) }

  @Test(
    "2 MiB pages", .enabled(if: Host.hasHugePages(8), "needs free 2 MiB pages"),
    arguments: [FakeFirecracker.Naming.kib, .both])
  func hugePages(naming: FakeFirecracker.Naming) throws {
    try serve(regions: 2, pages: 2, pageSize: .size2MiB, naming: naming)
  }

  @Test(
    "Regions of the image that end elsewhere than the VM's", arguments: [[5, 90, 33], [1, 127]])
  func otherCuts(blocks: [Int]) throws { try serve(regions: 4, pages: 32, imageBlocks: blocks) }

  @Test("A damaged page is poisoned although Firecracker did not ask for POISON")
  func damage() throws {
    let firecracker = try FakeFirecracker(regions: 1, pages: 16)
    let pair = try UnixSocket.pair()
    try firecracker.send(on: pair.first)
    let handover = try FirecrackerHandover.receive(on: pair.second)
    let region = try PagedRegion(
      host: handover.regions[0].host, pageSize: .size4KiB, guestAddress: GuestAddress(0))
    let session = try PagerSession(
      userfaultfd: handover.userfaultfd, regions: [region],
      source: PatternSource(damagedBlocks: [3]), registers: false)
    try session.start()
    defer { session.release() }
    try #require(Host.has(.poison))
    #expect(guardedLoad(firecracker.ranges[0], offset: 3 * 4096) == .busError)
    #expect(guardedLoad(firecracker.ranges[0], offset: 0) != .busError)
    #expect(session.failures.first?.isPoisoned == true)
  }

  @Test("A VM that is another machine than the image is refused")
  func otherMachine() throws {
    let firecracker = try FakeFirecracker(regions: 2, pages: 16)
    let pair = try UnixSocket.pair()
    try firecracker.send(on: pair.first)
    let handover = try FirecrackerHandover.receive(on: pair.second)
    for blocks in [[31], [33], [64]] {
      let error = #expect(throws: HandoverError.self) {
        _ = try ContentMap.ranges(of: handover.regions, in: imageRegions(blocks))
      }
      #expect(error?.code == .imageMismatch)
    }
  }
}

/// A socket that a thread uses.
final class SocketBox: Sendable {
  let socket: UnixSocket
  init(_ socket: consuming UnixSocket) { self.socket = socket }
}
