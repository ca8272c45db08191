// SPDX-License-Identifier: Apache-2.0

import Foundation
import LinuxSystem
import MemoryImage
import SystemPackage
import TestSupport
import Testing

@Suite("An image is known by its id, whatever has its name")
struct ChangedFileTests {
  private static let runs = [WorkingSetRun(region: 0, firstBlock: 2, blockCount: 3)]

  /// A block with data, and what reading it says now.
  private func failure(_ image: MemoryImage, region: Int = 0, block: Int) -> ImageError? {
    var room = Sample.zeroBlock
    return imageError {
      _ = try unsafe room.withUnsafeMutableBytes {
        try unsafe image.read(
          region: region, firstBlock: block, blockCount: 1, into: $0.baseAddress.unsafelyUnwrapped)
      }
    }
  }

  /// Writes bytes into a file, which stays the same file.
  private func overwrite(_ path: FilePath, _ bytes: [UInt8]) throws {
    let file = try OwnedDescriptor(openingForUpdate: path)
    try file.setLength(0)
    try file.writeAll(bytes, at: 0)
  }

  /// The last block of a region with data.
  private func lastBlock(_ sample: Sample) throws -> Int { try #require(sample.data[0].keys.max()) }

  @Test("A working set goes to the image that it is for, or nowhere")
  func workingSet() throws {
    try withTemporaryDirectory { directory in
      let path = FilePath(directory + "/a.img")
      let other = FilePath(directory + "/b.img")
      try Sample.smallMachine.write(to: path)
      // The same machine, another image.
      try Sample.smallMachine.write(to: other)
      let image = try MemoryImage(path: path)
      // Its own working set makes no other image of it.
      try image.storeWorkingSet(Self.runs)
      try image.storeWorkingSet(
        Self.runs + [WorkingSetRun(region: 1, firstBlock: 0, blockCount: 1)])
      try image.storeWorkingSet(Self.runs)
      #expect(try image.workingSet()?.runs == Self.runs)

      func expectRefused(_ what: Comment) throws {
        let before = try? contents(of: path)
        let error = imageError { try image.storeWorkingSet(Self.runs) }
        #expect(error?.code == .changed, what)
        #expect(error?.description.contains("does not have image \(image.id)") == true, what)
        #expect(try before == (before == nil ? nil : contents(of: path)), what)
      }
      let intact = try contents(of: path)
      try overwrite(path, try contents(of: other))
      try expectRefused("overwritten in place")
      try overwrite(path, Array("something else".utf8))
      try expectRefused("no image any more")
      try overwrite(path, Array(intact.prefix(5000)))
      try expectRefused("cut")
      // Its bytes again: it is that image.
      try overwrite(path, intact)
      try image.storeWorkingSet(nil)
      #expect(try image.workingSet() == nil)
      try FileManager.default.removeItem(atPath: path.string)
      try expectRefused("removed")
      try FileManager.default.copyItem(atPath: other.string, toPath: path.string)
      try expectRefused("replaced")
    }
  }

  @Test(
    "What is wrong with a block of a file that was changed says so", arguments: Sample.encodings)
  func reading(options: ImageOptions) throws {
    try withTemporaryDirectory { directory in
      let path = FilePath(directory + "/a.img")
      let other = FilePath(directory + "/b.img")
      let sample = Sample(seed: 3, blocks: [200])
      let block = try lastBlock(sample)
      try sample.write(to: path, options)
      try Sample(seed: 4, blocks: [200]).write(to: other, options)
      let intact = try contents(of: path)
      func error(_ change: () throws -> Void) throws -> ImageError {
        try overwrite(path, intact)
        let image = try MemoryImage(path: path)
        try change()
        return try #require(failure(image, block: block))
      }
      var found = try error { try overwrite(path, try contents(of: other)) }
      #expect([.damaged, .truncated].contains(found.code))
      #expect(
        found.description.contains("changed while it was open: it holds something else now")
          || found.description.contains("changed while it was open: it has"), "\(found)")
      found = try error { try overwrite(path, Array(intact.prefix(4100))) }
      #expect(found.code == .truncated)
      #expect(
        found.description.contains("the file was changed while it was open: it has 4100 bytes now"))
      found = try error {
        try overwrite(path, Array(intact.prefix(4096)) + intact.dropFirst(4096).map { ~$0 })
      }
      #expect(found.code == .damaged)
      #expect(
        found.description.contains("changed while it was open: its time of modification"),
        "\(found)")
    }
  }

  @Test("Damage of a file that nobody wrote to is not called a change")
  func damaged() throws {
    try withTemporaryDirectory { directory in
      let path = FilePath(directory + "/a.img")
      let sample = Sample(seed: 3, blocks: [200])
      try sample.write(to: path, ImageOptions(encoding: .stored))
      var bytes = try contents(of: path)
      let block = try lastBlock(sample)
      let content = try #require(sample.data[0][block])
      let place = try #require(bytes.firstRange(of: content))
      bytes[place.lowerBound] ^= 1
      try overwrite(path, bytes)
      let image = try MemoryImage(path: path)
      let error = try #require(failure(image, block: block))
      #expect(error.code == .damaged && !error.description.contains("was changed"), "\(error)")
    }
  }

  @Test("An image below that was overwritten is named")
  func ancestor() throws {
    try withTemporaryDirectory { directory in
      let (below, path) = (FilePath(directory + "/a.img"), FilePath(directory + "/b.img"))
      let sample = Sample(seed: 3, blocks: [200])
      let block = try lastBlock(sample)
      try sample.write(to: below)
      let writer = try ImageWriter(
        path: path, regions: sample.regions, parent: try MemoryImage(path: below))
      try writer.finish()
      let image = try MemoryImage(path: path)
      try overwrite(below, [UInt8](repeating: 7, count: 1 << 20))
      let error = try #require(failure(image, block: block))
      #expect(error.path == below)
      #expect(error.description.contains("the file was changed while it was open"), "\(error)")
    }
  }
}
