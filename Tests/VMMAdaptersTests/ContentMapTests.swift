// SPDX-License-Identifier: Apache-2.0

import LinuxSystem
import MemoryImage
import TestSupport
import Testing

@testable import VMMAdapters

/// Handed regions of some numbers of blocks, one after the other in the memory file, in
/// that order in memory or in the other one.
private func handed(
  _ blocks: [Int], pageSize: PageSize = .size4KiB, backwards: Bool = false
) throws -> [HandedRegion] {
  var offset = 0
  let claims = blocks.enumerated().map { number, count in
    defer { offset += count * 4096 }
    let slot = backwards ? blocks.count - number : number + 1
    return ClaimedRegion(
      host: UInt64(slot) << 32, length: UInt64(count * 4096), position: UInt64(offset),
      scale: .offset, pageSize: UInt64(pageSize.bytes))
  }
  return try HandedRegion.check(claims, limit: 1024)
}

@Suite("Handed regions and the image's regions")
struct ContentMapTests {
  @Test("Each block of the memory file is served once, from its own place")
  func partition() throws {
    var random = SystemRandomNumberGenerator()
    for round in 0..<200 {
      let total = Int.random(in: 1...60, using: &random)
      /// A random way to write `total` as a sum.
      func cuts() -> [Int] {
        var (rest, parts) = (total, [Int]())
        while rest > 0 {
          let part = Int.random(in: 1...rest, using: &random)
          parts.append(part)
          rest -= part
        }
        return parts
      }
      let regions = try handed(cuts(), backwards: round % 2 == 1)
      let image = imageRegions(cuts())
      let ranges = try ContentMap.ranges(of: regions, in: image)
      var base = 0
      let bases = image.map { region in
        defer { base += region.blockCount }
        return base
      }
      // The block of the memory file, by the image's place, and by the host's.
      var seen: Set<Int> = []
      for range in ranges {
        let region = regions[range.handedRegion]
        for (index, block) in range.blocks.enumerated() {
          let fromImage = bases[range.imageRegion] + block
          let hostOffset = region.host.start.distance(to: range.host.start) / 4096 + index
          #expect(fromImage == Int(region.position) / 4096 + hostOffset)
          #expect(seen.insert(fromImage).inserted)
        }
        #expect(range.blocks.upperBound <= image[range.imageRegion].blockCount)
        #expect(
          range.guestAddress.rawValue
            == image[range.imageRegion].guestAddress.rawValue + UInt64(range.imageOffset))
      }
      #expect(seen.count == total)
      #expect(zip(ranges, ranges.dropFirst()).allSatisfy { $0.host.end <= $1.host.start })
      #expect(ranges.count <= regions.count + image.count)
    }
  }

  @Test("A gap between what is asked for is refused, as is what lies beyond the image")
  func gaps() throws {
    let image = imageRegions([16])
    for (position, length) in [(4096, 4096), (15 * 4096, 8192), (1 << 40, 4096)] {
      let claims = [
        ClaimedRegion(
          host: 1 << 32, length: UInt64(length), position: UInt64(position), scale: .offset,
          pageSize: 4096)
      ]
      let regions = try HandedRegion.check(claims, limit: 4)
      let error = #expect(throws: HandoverError.self) {
        _ = try ContentMap.ranges(of: regions, in: image)
      }
      #expect(error?.code == .imageMismatch)
    }
  }

  @Test("A huge page whose content would come from two regions is refused")
  func hugePages() throws {
    let huge = 512
    let whole = try ContentMap.ranges(
      of: handed([2 * huge], pageSize: .size2MiB), in: imageRegions([huge, huge]))
    #expect(whole.map(\.imageRegion) == [0, 1])
    let error = #expect(throws: HandoverError.self) {
      _ = try ContentMap.ranges(
        of: handed([2 * huge], pageSize: .size2MiB), in: imageRegions([huge + 1, huge - 1]))
    }
    #expect(error?.description.contains("within a page of 2 MiB") == true)
  }

  @Test("By guest address, a part of the image will do, and gaps of the guest are refused")
  func guestAddresses() throws {
    let image = imageRegions([16, 16])
    let second = image[1].guestAddress.rawValue
    func ranges(_ address: UInt64, _ blocks: Int) throws -> [ContentRange] {
      let claims = [
        ClaimedRegion(
          host: 1 << 32, length: UInt64(blocks * 4096), position: address, scale: .guestAddress,
          pageSize: 4096)
      ]
      return try ContentMap.ranges(of: HandedRegion.check(claims, limit: 4), in: image)
    }
    let part = try ranges(second + 8192, 4)
    #expect(part.map(\.imageRegion) == [1] && part[0].blocks == 2..<6)
    #expect(throws: HandoverError.self) { _ = try ranges(0, 17) }
    #expect(throws: HandoverError.self) { _ = try ranges(second - 4096, 2) }
    #expect(throws: HandoverError.self) { _ = try ranges(second + 16 * 4096, 1) }
  }

  @Test("An image that ends where the address space does")
  func endOfAddressSpace() throws {
    let image = [
      ImageRegion(
        name: "top", guestAddress: GuestAddress(.max - 8191), length: 8192, pageSize: .size4KiB)
    ]
    #expect(throws: HandoverError.self) {
      let claims = [
        ClaimedRegion(
          host: 1 << 32, length: 4096, position: 0, scale: .guestAddress, pageSize: 4096)
      ]
      _ = try ContentMap.ranges(of: HandedRegion.check(claims, limit: 4), in: image)
    }
  }
}
