// SPDX-License-Identifier: Apache-2.0

import Glibc
import LinuxSystem
import MemoryImage
import Synchronization
import SystemPackage
import TestSupport
import Testing

@Suite("Raw files become images and images raw files")
struct CopyTests {
  /// A sparse file: data at odd places, holes between.
  private func makeRaw(_ path: FilePath, seed: UInt64, mebibytes: Int = 9) throws {
    var random = Random(seed: seed)
    let file = try FileDescriptor.open(
      path, .readWrite, options: [.create, .truncate], permissions: .ownerReadWrite)
    try file.closeAfter {
      try file.resize(to: Int64(mebibytes << 20))
      for _ in 0..<40 {
        let page = Int.random(in: 0..<mebibytes * 256 - 8, using: &random)
        let bytes = (0..<Int.random(in: 1...8, using: &random)).flatMap { _ in
          Sample.randomBlock(&random)
        }
        _ = try file.writeAll(toAbsoluteOffset: Int64(page * 4096), bytes)
      }
    }
  }

  @Test(
    "Export gives back every byte, and holes", arguments: Sample.encodings, [1, 3])
  func roundTrip(options: ImageOptions, threads: Int) throws {
    try withTemporaryDirectory { directory in
      let directory = FilePath(directory)
      let raw = directory.appending("raw")
      let image = directory.appending("image")
      let back = directory.appending("back")
      try makeRaw(raw, seed: 21)
      let steps = ProgressLog()
      try RawImport.makeImage(
        image, from: raw, options: options, metadata: ["k": "v"], threads: threads
      ) { steps.note($0, $1) }
      #expect(steps.last == 9 << 20)
      let opened = try MemoryImage(path: image)
      #expect(opened.metadata == ["k": "v"])
      #expect(try opened.verify().isIntact)
      try opened.export(to: back, threads: threads)
      #expect(isSame(try contents(of: raw), try contents(of: back)))
      let allocated = try OwnedDescriptor(openingForReading: back).status.allocatedBytes
      #expect(allocated <= 40 * 8 * 4096)
    }
  }

  @Test("An import on a parent holds what differs, and merges into an image of its own")
  func incremental() throws {
    try withTemporaryDirectory { directory in
      let directory = FilePath(directory)
      let first = directory.appending("first")
      let second = directory.appending("second")
      try makeRaw(first, seed: 1)
      try makeRaw(second, seed: 2)
      let base = directory.appending("base.img")
      let top = directory.appending("top.img")
      let whole = directory.appending("whole.img")
      try RawImport.makeImage(base, from: first)
      try RawImport.makeImage(top, from: second, parent: try MemoryImage(path: base))
      let image = try MemoryImage(path: top)
      #expect(image.ancestors.count == 1)
      try image.merge(to: whole)
      try #require(unsafe unlink(base.string) == 0)
      let merged = try MemoryImage(path: whole)
      #expect(merged.ancestors.isEmpty)
      let back = directory.appending("back")
      try merged.export(to: back)
      #expect(isSame(try contents(of: second), try contents(of: back)))
      let usage = try merged.usage(ofRegion: 0)
      #expect(usage.inheritedBlocks == 0)
      #expect(usage.zeroBlocks + usage.ownBlocks == 9 * 256)
    }
  }

  @Test(
    "What is no memory file is refused, and nothing is left",
    arguments: ["missing", "empty", "odd", "directory", "fifo"])
  func refusals(kind: String) throws {
    try withTemporaryDirectory { directory in
      let directory = FilePath(directory)
      let source = directory.appending("source")
      switch kind {
      case "empty": try makeRaw(source, seed: 1, mebibytes: 1)
      case "odd": try makeRaw(source, seed: 1, mebibytes: 1)
      case "directory": try #require(unsafe mkdir(source.string, 0o700) == 0)
      case "fifo": try #require(unsafe mkfifo(source.string, 0o600) == 0)
      default: break
      }
      if kind == "empty" { try #require(unsafe truncate(source.string, 0) == 0) }
      if kind == "odd" { try #require(unsafe truncate(source.string, 5000) == 0) }
      let image = directory.appending("image")
      let error = imageError { try RawImport.makeImage(image, from: source) }
      #expect(error?.path == source)
      #expect(unsafe access(image.string, F_OK) != 0)
    }
  }

  @Test("Damage stops an export and a merge, and leaves nothing behind")
  func damage() throws {
    try withTemporaryDirectory { directory in
      let directory = FilePath(directory)
      let raw = try Sample.machineImage.get()
      let file = try ScratchFile(raw.bytes)
      try file.write(
        [raw.bytes[raw.dataOffset(region: 0, block: 3)] ^ 1],
        at: raw.dataOffset(region: 0, block: 3))
      let image = try MemoryImage(path: file.path)
      for name in ["export", "merge"] {
        let target = directory.appending(name)
        let error = imageError {
          if name == "export" { try image.export(to: target) } else { try image.merge(to: target) }
        }
        #expect(error?.code == .damaged)
        #expect(error?.block == 3)
        #expect(unsafe access(target.string, F_OK) != 0)
      }
    }
  }
}

/// The greatest progress that was reported.
private final class ProgressLog: Sendable {
  private let greatest = Mutex(0)
  func note(_ done: Int, _ total: Int) { greatest.withLock { $0 = max($0, done) } }
  var last: Int { greatest.withLock { $0 } }
}
