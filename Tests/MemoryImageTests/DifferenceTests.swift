// SPDX-License-Identifier: Apache-2.0

import LinuxSystem
import MemoryImage
import SystemPackage
import TestSupport
import Testing

@Suite("The difference of two images is that of their memory")
struct DifferenceTests {
  /// Two samples and their images, made as the arguments say.
  private func compare(
    _ first: Sample, _ second: Sample, options: [ImageOptions] = [ImageOptions(), ImageOptions()],
    threads: Int = 2
  ) throws -> ImageDifference {
    try withTemporaryDirectory { directory in
      let paths = ["first", "second"].map { FilePath(directory).appending($0) }
      try first.write(to: paths[0], options[0])
      try second.write(to: paths[1], options[1])
      return try ImageDifference(
        MemoryImage(path: paths[0]), MemoryImage(path: paths[1]), threads: threads)
    }
  }

  /// What comparing every block of two samples with the same regions gives.
  private func expectOracle(
    _ difference: ImageDifference, _ first: Sample, _ second: Sample,
    sourceLocation: SourceLocation = #_sourceLocation
  ) {
    #expect(difference.parts.count == first.regions.count, sourceLocation: sourceLocation)
    for (number, part) in difference.parts.enumerated() {
      let blocks = 0..<first.regions[number].blockCount
      let differing = blocks.filter {
        !isSame(first.block(number, $0), second.block(number, $0))
      }
      #expect(
        blocks.filter { part.differing.contains($0) } == differing, sourceLocation: sourceLocation)
      #expect(part.differing.count == differing.count, sourceLocation: sourceLocation)
      let zero = [first, second].map { sample in
        differing.count { isSame(sample.block(number, $0), Sample.zeroBlock) }
      }
      #expect([part.zeroInFirst, part.zeroInSecond] == zero, sourceLocation: sourceLocation)
      #expect(part.isEqual == differing.isEmpty, sourceLocation: sourceLocation)
    }
  }

  @Test(
    "Images without a common ancestor are compared block by block, whatever their encoding",
    arguments: [(0, 0), (0, 1), (1, 2), (3, 1)], [1, 4])
  func unrelated(encodings: (Int, Int), threads: Int) throws {
    let first = Sample(seed: 1, blocks: [2100, 7])
    var second = first
    var random = SeededRandom(seed: 2)
    for _ in 0..<40 {
      let (region, block) = Bool.random(using: &random) ? (0, Int.random(in: 0..<2100)) : (1, 3)
      second.data[region][block] = Bool.random() ? nil : Sample.randomBlock(&random)
    }
    let options = [Sample.encodings[encodings.0], Sample.encodings[encodings.1]]
    let difference = try compare(first, second, options: options, threads: threads)
    expectOracle(difference, first, second)
    // Nothing but zeros is known to be equal.
    let zeros = [0, 1].reduce(0) { count, region in
      count
        + (0..<first.regions[region].blockCount).count {
          first.data[region][$0] == nil && second.data[region][$0] == nil
        }
    }
    #expect(difference.parts.reduce(0) { $0 + $1.comparedBlocks } == 2107 - zeros)
  }

  @Test("Equal memory is equal, also of images that share nothing")
  func equal() throws {
    let sample = Sample(seed: 4, blocks: [1500])
    let difference = try compare(sample, sample, options: [Sample.encodings[0], ImageOptions()])
    #expect(difference.isEqual)
    #expect(difference.differingBlocks == 0 && difference.commonBlocks == 1500)
  }

  @Test("In a chain only what changed is read, up, down, and from one branch to another")
  func chain() throws {
    try withTemporaryDirectory { directory in
      let directory = FilePath(directory)
      var random = SeededRandom(seed: 6)
      let base = Sample(seed: 5, blocks: [1100, 40])
      try base.write(to: directory.appending("base"))
      let parent = try MemoryImage(path: directory.appending("base"))
      var samples = [base]
      var images = [parent]
      var changed = [Set<Int>()]
      for name in ["left", "right"] {
        var sample = base
        var changes: [Int: [UInt8]] = [:]
        for _ in 0..<20 {
          let block = Int.random(in: 0..<1100, using: &random)
          changes[block] = Sample.randomBlock(&random)
          sample.data[0][block] = changes[block]
        }
        let path = directory.appending(name)
        let writer = try ImageWriter(path: path, regions: base.regions, parent: parent)
        try writer.write(region: 0, blocks: changes)
        try writer.finish()
        samples.append(sample)
        images.append(try MemoryImage(path: path))
        changed.append(Set(changes.keys))
      }
      for (first, second) in [(0, 1), (1, 0), (1, 2), (2, 1), (0, 0), (1, 1)] {
        let difference = try ImageDifference(images[first], images[second])
        expectOracle(difference, samples[first], samples[second])
        let mostRead = first == second ? 0 : changed[first].union(changed[second]).count
        #expect(difference.parts.reduce(0) { $0 + $1.comparedBlocks } <= mostRead)
      }
      // An image that was merged shares nothing, and is equal.
      try images[1].merge(to: directory.appending("merged"))
      let merged = try MemoryImage(path: directory.appending("merged"))
      #expect(try ImageDifference(images[1], merged).isEqual)
    }
  }

  @Test("Blocks that are the same in an ancestor are not looked at: its damage does not matter")
  func sharedDamage() throws {
    try withTemporaryDirectory { directory in
      let raw = try Sample.machineImage.get()
      let base = try ScratchFile(raw.bytes)
      let top = FilePath(directory).appending("top")
      let writer = try ImageWriter(
        path: top, regions: Sample.machine.regions, parent: try MemoryImage(path: base.path))
      try writer.write(region: 0, blocks: [1: [UInt8](repeating: 9, count: 4096)])
      try writer.finish()
      let place = raw.dataOffset(region: 0, block: 3)
      try base.write([raw.bytes[place] ^ 1], at: place)
      let images = (try MemoryImage(path: base.path), try MemoryImage(path: top))
      #expect(try ImageDifference(images.0, images.1).differingBlocks == 1)
      // What has to be read is checked.
      let other = FilePath(directory).appending("other")
      // In another encoding it has another content id.
      try Sample.machine.write(to: other, ImageOptions())
      let error = imageError { _ = try ImageDifference(images.1, MemoryImage(path: other)) }
      #expect(error?.code == .damaged && error?.block == 3 && error?.path == base.path)
    }
  }

  @Test("Memory is matched by its address; what only one image has is said")
  func regions() throws {
    func sample(_ regions: [(UInt64, Int)]) -> Sample {
      var sample = Sample(seed: 1, blocks: regions.map(\.1))
      for (number, region) in regions.enumerated() {
        sample.regions[number].guestAddress = GuestAddress(region.0 * 4096)
        sample.regions[number].name = "r\(region.0)"
        // A block's content is its guest address.
        sample.data[number] = [:]
        for block in 0..<region.1 {
          let byte = UInt8(truncatingIfNeeded: Int(region.0 % 97) + block + 1)
          sample.data[number][block] = [UInt8](repeating: byte, count: 4096)
        }
      }
      return sample
    }
    let end = UInt64.max / 4096 + 1
    let first = sample([(20, 10), (0, 8), (40, 5), (end - 3, 3)])
    let second = sample([(4, 20), (60, 2), (end - 3, 3)])
    let difference = try compare(first, second)
    let found = difference.parts.map { part in
      "\(part.guestAddress.rawValue / 4096)+\(part.blockCount) "
        + "\(part.first.map { "\($0.region):\($0.firstBlock)" } ?? "-") "
        + "\(part.second.map { "\($0.region):\($0.firstBlock)" } ?? "-") \(part.differing.count)"
    }
    #expect(
      found == [
        "0+4 1:0 - 0", "4+4 1:4 0:0 0", "8+12 - 0:4 0", "20+4 0:0 0:16 0", "24+6 0:4 - 0",
        "40+5 2:0 - 0", "60+2 - 1:0 0", "\(end - 3)+3 3:0 2:0 0",
      ])
    #expect(!difference.isEqual && difference.differingBlocks == 0)
    #expect(difference.commonBlocks == 11)
  }

  @Test("A set of blocks counts and lists what was put in", arguments: [1, 2, 3] as [UInt64])
  func blockSet(seed: UInt64) {
    var random = SeededRandom(seed: seed)
    var set = BlockSet()
    var other = BlockSet()
    var oracle = Set<Int>()
    for _ in 0..<60 {
      let start = Int.random(in: 0..<5000, using: &random)
      for block in start..<start + Int.random(in: 1...150, using: &random) {
        if Bool.random(using: &random) { set.insert(block) } else { other.insert(block) }
        oracle.insert(block)
      }
      // Many at once, of which some are there.
      let whole = Int.random(in: 0..<5000, using: &random)
      let many = whole..<whole + Int.random(in: 0...1300, using: &random) / 8
      set.insert(many)
      oracle.formUnion(many)
    }
    set.formUnion(other)
    #expect(set.count == oracle.count)
    for _ in 0..<200 {
      let start = Int.random(in: -10..<5200, using: &random)
      let range = start..<start + Int.random(in: 0..<3000, using: &random)
      #expect(set.count(in: range) == oracle.count { range.contains($0) })
      let first = oracle.filter { range.contains($0) }.min()
      let end = first.map {
        ($0..<range.upperBound).first { !oracle.contains($0) } ?? range.upperBound
      }
      let run = first.flatMap { first in end.map { first..<$0 } }
      #expect(set.firstRun(in: range) == run)
    }
    var listed: [Range<Int>] = []
    set.forEachRange { listed.append($0) }
    #expect(listed.flatMap(Array.init) == oracle.sorted())
    for (left, right) in zip(listed, listed.dropFirst()) {
      #expect(left.upperBound < right.lowerBound)
    }
  }
}
