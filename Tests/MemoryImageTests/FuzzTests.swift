// SPDX-License-Identifier: Apache-2.0

import Glibc
import LinuxSystem
import MemoryImage
import SystemPackage
import TestSupport
import Testing

/// The seeds of the fuzzer; scripts/image-corpus.sh makes them.
private enum Corpus {
  static let directory = FilePath(#filePath).removingLastComponent().appending("Corpus")
  static let names = ["stored.img", "parent.img", "child.img"]

  static func image(_ name: String) throws -> RawImage {
    RawImage(bytes: try contents(of: directory.appending(name)))
  }
}

/// Images that are changed at random, in a directory of their own.
private struct Fuzzer {
  let directory: FilePath
  let intact: [String: RawImage]
  /// Every block of data of the seeds: whatever an image says, it may return nothing else.
  let known: Set<[UInt8]>
  /// What the seeds read as.
  private(set) var opened = 0
  private(set) var dataBlocks = 0
  private(set) var workingSets = 0

  init(_ directory: String) throws {
    self.directory = FilePath(directory)
    var images: [String: RawImage] = [:]
    var known: Set<[UInt8]> = []
    for name in Corpus.names {
      images[name] = try Corpus.image(name)
      let image = try MemoryImage(path: Corpus.directory.appending(name))
      for block in 0..<image.regions[0].blockCount {
        let (run, blocks) = try image.read(region: 0, firstBlock: block, blockCount: 1)
        if run.kind == .data { known.formUnion(blocks) }
      }
    }
    intact = images
    self.known = known
  }

  /// Changes one or more seeds and reads all of the one with that name.
  mutating func run(_ name: String, _ random: inout SeededRandom) throws {
    let seals = Int.random(in: 0..<4, using: &random) > 0
    let changed = name == "child.img" && Bool.random(using: &random) ? "parent.img" : name
    for other in Corpus.names {
      guard var image = intact[other] else { continue }
      if other == changed {
        for _ in 0..<Int.random(in: 1...3, using: &random) { image.mutateFormat(&random) }
        if seals, image.bytes.count >= 4096 { image.resealAll() }
      }
      try write(image.bytes, other)
    }
    var reader: MemoryImage?
    _ = imageError { reader = try MemoryImage(path: directory.appending(name)) }
    guard let reader else { return }
    opened += 1
    if (try? reader.workingSet()) ?? nil != nil { workingSets += 1 }
    // Not for more blocks than a debug build can read.
    guard reader.regions.allSatisfy({ $0.length <= 1 << 22 }) else { return }
    for (region, description) in reader.regions.enumerated() {
      try read(reader, region, description.blockCount, &random)
    }
    _ = try? reader.verify(sample: Bool.random(using: &random) ? 1 : 0.3)
  }

  private mutating func read(
    _ image: MemoryImage, _ region: Int, _ count: Int, _ random: inout SeededRandom
  ) throws {
    var block = 0
    while block < count {
      let limit = min(Int.random(in: 1...9, using: &random), count - block)
      guard
        let (run, blocks) = try? image.read(region: region, firstBlock: block, blockCount: limit)
      else {
        block += 1
        continue
      }
      for bytes in blocks {
        dataBlocks += 1
        #expect(known.contains(bytes), "block \(block) is nothing that was ever written")
      }
      block += run.blockCount
    }
  }

  func write(_ bytes: [UInt8], _ name: String) throws {
    let file = try FileDescriptor.open(
      directory.appending(name), .writeOnly, options: [.create, .truncate],
      permissions: .ownerReadWrite)
    try file.closeAfter { _ = try file.writeAll(bytes) }
  }
}

@Suite("Images changed at random, with right checksums, are read safely")
struct FuzzTests {
  @Test("The seeds are sound: each kind of chunk, a chain, and a working set")
  func seeds() throws {
    var total = 0
    for name in Corpus.names {
      let image = try MemoryImage(path: Corpus.directory.appending(name))
      #expect(try image.verify().isIntact)
      total += try Corpus.image(name).bytes.count
    }
    let child = try MemoryImage(path: Corpus.directory.appending("child.img"))
    #expect(child.ancestors.count == 1)
    #expect(try child.workingSet()?.runs.count == 3)
    #expect(total < 200 << 10)
    // What the fuzzer's checksums are worth: they leave a sound image as it is.
    for name in Corpus.names {
      let intact = try Corpus.image(name)
      var sealed = intact
      sealed.resealAll()
      #expect(isSame(sealed.bytes, intact.bytes), "\(name)")
    }
  }

  @Test(
    "Thousands of changes give no block that was never written, in bounded time and memory",
    arguments: ["stored.img", "parent.img", "child.img"], [1, 2] as [UInt64])
  func changes(name: String, seed: UInt64) async {
    await #expect(processExitsWith: .success) { [name = name as String, seed = seed as UInt64] in
      try withTemporaryDirectory { directory in
        var fuzzer = try Fuzzer(directory)
        var random = SeededRandom(seed: seed)
        try fuzzer.run(name, &random)
        let before = peakKiB()
        let clock = ContinuousClock()
        for number in 0..<600 {
          let time = try clock.measure { try fuzzer.run(name, &random) }
          #expect(time < .seconds(60), "case \(number) of seed \(seed)")
        }
        #expect(peakKiB() - before < 64 << 10)
        #expect(fuzzer.opened > 100 && fuzzer.dataBlocks > 600)
        #expect(name != "child.img" || fuzzer.workingSets > 60)
      }
    }
  }

  @Test("An image that builds on itself, or on one that builds on it, is refused")
  func cycles() throws {
    try withTemporaryDirectory { directory in
      let fuzzer = try Fuzzer(directory)
      var child = try Corpus.image("child.img")
      var parent = try Corpus.image("parent.img")
      let table = try #require(child.extent(ofTable: RawImage.Header.ancestors))
      let id = RawImage.Header.contentID
      // The child's own id, size and name in the place of the parent's.
      var own = child
      own.bytes.replaceSubrange(
        table.lowerBound..<table.lowerBound + 32, with: child.bytes[id..<id + 32])
      own.set(table.lowerBound + 32, word: child.word(RawImage.Header.chunkCount))
      own.set(table.lowerBound + 40, half: child.half(RawImage.Header.blocksPerChunk))
      let hint = Array("/tmp/faultline-corpus/parent.img".utf8)
      #expect(child.bytes[table].contains(hint))
      own.resealAll()
      try fuzzer.write(own.bytes, "parent.img")
      try fuzzer.write(own.bytes, "child.img")
      let path = fuzzer.directory.appending("child.img")
      #expect(imageError { _ = try MemoryImage(path: path) }?.code == .invalidLayout)

      // A parent that names the child as its parent.
      let start = parent.bytes.count
      var entry = Array(child.bytes[table])
      entry.replaceSubrange(0..<32, with: child.bytes[id..<id + 32])
      parent.bytes += [UInt8](repeating: 0, count: -start & 7)
      parent.set(RawImage.Header.ancestors, word: UInt64(parent.bytes.count))
      parent.set(RawImage.Header.ancestors + 8, word: UInt64(entry.count))
      parent.set(RawImage.Header.ancestorCount, half: 1)
      parent.bytes += entry
      parent.set(RawImage.Header.fileLength, word: UInt64(parent.bytes.count))
      parent.resealAll()
      child.resealAll()
      try fuzzer.write(parent.bytes, "parent.img")
      try fuzzer.write(child.bytes, "child.img")
      #expect(imageError { _ = try MemoryImage(path: path) }?.code == .invalidLayout)
    }
  }
}

/// The most memory that this process ever had (getrusage(2)).
private func peakKiB() -> Int {
  var usage = rusage()
  unsafe getrusage(__rusage_who_t(RUSAGE_SELF.rawValue), &usage)
  return usage.ru_maxrss
}
