// SPDX-License-Identifier: Apache-2.0

import Glibc
import LinuxSystem
import MemoryImage
import SystemPackage
import TestSupport
import Testing

@Suite("Images that build on others")
struct ParentTests {
  /// A chain of images: each changes some blocks of the one before, and clears some.
  private func chain(
    _ options: [ImageOptions], in directory: FilePath
  ) throws -> [(sample: Sample, path: FilePath)] {
    var random = SeededRandom(seed: 11)
    var sample = Sample(seed: 10, blocks: [1100, 40])
    var chain: [(sample: Sample, path: FilePath)] = []
    for (generation, options) in options.enumerated() {
      let path = directory.appending("image\(generation)")
      if let parent = chain.last {
        var changes: [[Int: [UInt8]]] = [[:], [:]]
        for region in 0..<2 {
          for block in 0..<sample.regions[region].blockCount
          where Int.random(in: 0..<12, using: &random) == 0 {
            let bytes =
              Bool.random(using: &random) ? Sample.zeroBlock : Sample.randomBlock(&random)
            changes[region][block] = bytes
            sample.data[region][block] = bytes == Sample.zeroBlock ? nil : bytes
          }
        }
        let writer = try ImageWriter(
          path: path, regions: sample.regions, options: options,
          parent: try MemoryImage(path: parent.path))
        for region in 0..<2 { try writer.write(region: region, blocks: changes[region]) }
        try writer.finish()
      } else {
        try sample.write(to: path, options)
      }
      chain.append((sample, path))
    }
    return chain
  }

  @Test(
    "Each image of a chain reads as what it was made from, whatever encodings it mixes",
    arguments: [
      [0, 0], [1, 1, 1], [0, 1, 2, 0], [2, 3, 1, 0, 1, 2],
    ])
  func chains(encodings: [Int]) throws {
    try withTemporaryDirectory { directory in
      let chain = try chain(encodings.map { Sample.encodings[$0] }, in: FilePath(directory))
      for (generation, link) in chain.enumerated() {
        let image = try MemoryImage(path: link.path)
        #expect(image.ancestors.count == generation)
        for limit in [1, 64] {
          let comparison = link.sample.compare(with: image, limit: limit)
          #expect((comparison.right, comparison.wrong) == (1140, 0))
        }
        #expect(try image.verify().isIntact)
      }
    }
  }

  @Test("What equals the parent is not stored again", arguments: Sample.encodings)
  func unchanged(options: ImageOptions) throws {
    try withTemporaryDirectory { directory in
      let path = FilePath(directory).appending("child")
      let parent = try chain([options], in: FilePath(directory))[0]
      var writer = try ImageWriter(
        path: path, regions: parent.sample.regions, options: options,
        parent: try MemoryImage(path: parent.path))
      for region in 0..<2 {
        try writer.write(region: region, blocks: parent.sample.data[region])
      }
      try writer.setMetadata(key: "a", value: "b")
      try writer.finish()
      let image = try MemoryImage(path: path)
      #expect(parent.sample.compare(with: image).right == 1140)
      #expect(try OwnedDescriptor(openingForReading: path).status.allocatedBytes <= 14 * 4096)
    }
  }

  @Test(
    "A parent that is searched lends its blocks to any place, also those of its own ancestors",
    arguments: Sample.encodings)
  func searched(options: ImageOptions) throws {
    try withTemporaryDirectory { directory in
      let path = FilePath(directory).appending("child")
      let chain = try chain([options, ImageOptions()], in: FilePath(directory))
      var random = SeededRandom(seed: 12)
      var sample = chain[1].sample
      let parents = Set(sample.data.flatMap(\.values))
      // All blocks move, and one in ten is new.
      sample.data[0] = [:]
      var new = 0
      for block in 0..<1100 {
        if block % 10 == 0 {
          let bytes = Sample.randomBlock(&random)
          sample.data[0][block] = bytes
          new += parents.contains(bytes) ? 0 : 1
        } else {
          sample.data[0][block] = chain[1].sample.data[0][1099 - block]
        }
      }
      var writer = try ImageWriter(
        path: path, regions: sample.regions, options: options,
        parent: try MemoryImage(path: chain[1].path))
      try writer.searchParent()
      for region in 0..<2 {
        var blocks = sample.data[region]
        for block in 0..<sample.regions[region].blockCount where blocks[block] == nil {
          blocks[block] = Sample.zeroBlock
        }
        try writer.write(region: region, blocks: blocks)
      }
      try writer.finish()
      let image = try MemoryImage(path: path)
      let comparison = sample.compare(with: image)
      #expect((comparison.right, comparison.wrong) == (1140, 0))
      #expect(try image.verify().isIntact)
      let usage = try [0, 1].map { try image.usage(ofRegion: $0) }
      #expect(usage.reduce(0) { $0 + $1.ownBlocks } == new)
    }
  }

  @Test("A parent is found beside the image when both were moved, and missed when it is gone")
  func moved() throws {
    try withTemporaryDirectory { directory in
      let old = FilePath(directory).appending("old")
      let new = FilePath(directory).appending("new")
      try #require(unsafe mkdir(old.string, 0o700) == 0)
      let chain = try chain([ImageOptions(), ImageOptions()], in: old)
      try #require(unsafe rename(old.string, new.string) == 0)
      let path = new.appending("image1")
      #expect(chain[1].sample.compare(with: try MemoryImage(path: path)).right == 1140)

      try #require(unsafe unlink(new.appending("image0").string) == 0)
      let error = imageError { _ = try MemoryImage(path: path) }
      #expect(error?.code == .ancestorMissing)
      #expect(error?.description.contains("image0") == true)
    }
  }

  @Test("Another image in the parent's place is refused by its content id")
  func impostor() throws {
    try withTemporaryDirectory { directory in
      let chain = try chain([ImageOptions(), ImageOptions()], in: FilePath(directory))
      var other = chain[0].sample
      other.data[0][5] = Sample.zeroBlock.map { _ in 3 }
      try other.write(to: chain[0].path, ImageOptions())
      let error = imageError { _ = try MemoryImage(path: chain[1].path) }
      #expect(error?.code == .ancestorMissing)
      #expect(error?.description.contains("content id") == true)
    }
  }

  @Test("Damage in a parent is an error that names the parent's file")
  func damagedParent() throws {
    try withTemporaryDirectory { directory in
      let stored = ImageOptions(encoding: .stored)
      let chain = try chain([stored, stored], in: FilePath(directory))
      let raw = RawImage(bytes: try contents(of: chain[0].path))
      let image = try MemoryImage(path: chain[1].path)
      let block = try #require(
        chain[0].sample.data[0].keys.sorted().first {
          chain[0].sample.data[0][$0] == chain[1].sample.data[0][$0]
        })
      let place = raw.dataOffset(region: 0, block: block)
      let file = try FileDescriptor.open(chain[0].path, .readWrite)
      try file.closeAfter {
        _ = try file.writeAll(toAbsoluteOffset: Int64(place), [raw.bytes[place] ^ 1])
      }
      let error = imageError {
        _ = try image.read(region: 0, firstBlock: block, blockCount: 1)
      }
      #expect(error?.code == .damaged)
      #expect(error?.path.lastComponent?.string == "image0")
      #expect(error?.fileOffset == place)
      #expect(chain[1].sample.compare(with: image).wrong == 0)
      #expect(try image.verify().damages.contains { $0.firstBlock == block })
    }
  }

  @Test("A parent with other regions is refused, and leaves nothing behind")
  func otherRegions() throws {
    try withTemporaryDirectory { directory in
      let chain = try chain([ImageOptions()], in: FilePath(directory))
      let parent = try MemoryImage(path: chain[0].path)
      let path = FilePath(directory).appending("child")
      let error = imageError {
        _ = try ImageWriter(path: path, regions: [parent.regions[0]], parent: parent)
      }
      #expect(error?.code == .invalidArgument)
      #expect(unsafe access(path.string, F_OK) != 0)
    }
  }

  @Test("A chain ends at 64 ancestors")
  func longest() throws {
    try withTemporaryDirectory { directory in
      let region = ImageRegion(
        name: "ram", guestAddress: GuestAddress(0), length: 65 * 4096, pageSize: .size4KiB)
      var parent: MemoryImage?
      for generation in 0...65 {
        let path = FilePath(directory).appending("image\(generation)")
        let error = imageError {
          let writer = try ImageWriter(
            path: path, regions: [region], options: ImageOptions(encoding: .stored), parent: parent)
          let block = [UInt8](repeating: UInt8(generation + 1), count: 4096)
          if generation < 65 { try writer.write(region: 0, firstBlock: generation, block) }
          try writer.finish()
        }
        #expect((error == nil) == (generation < 65), "\(generation)")
        if generation < 65 { parent = try MemoryImage(path: path) }
      }
      #expect(error(of: parent) == nil)
      for block in 0..<65 {
        let read = try parent?.read(region: 0, firstBlock: block, blockCount: 1)
        #expect(read?.blocks.first?.first == UInt8(block + 1))
      }
    }
  }

  private func error(of image: MemoryImage?) -> String? {
    guard let image else { return "there is no image" }
    return (try? image.verify().isIntact) == true ? nil : "it is damaged"
  }
}
