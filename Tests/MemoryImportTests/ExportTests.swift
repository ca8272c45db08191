// SPDX-License-Identifier: Apache-2.0

import Foundation
import LinuxSystem
import MemoryImage
import MemoryImport
import Synchronization
import SystemPackage
import TestSupport
import Testing

/// Memory that fails from an offset on.
private struct FailingSource: RegionSource {
  struct Failure: Error {}
  let regions: [ImageRegion]
  let limit: Int

  @unsafe func read(
    region: Int, offset: Int, into buffer: UnsafeMutableRawBufferPointer
  ) throws(Failure) -> Bool {
    guard offset + buffer.count <= limit else { throw Failure() }
    unsafe buffer.initializeMemory(as: UInt8.self, repeating: 1)
    return true
  }
}

@Suite("A raw export is the memory, sparse, complete or not there")
struct ExportTests {
  @Test("Export gives the file back that was imported, holes as holes", arguments: [1, 2, 3, 4])
  func roundTrip(seed: UInt64) throws {
    try withDirectory { directory in
      var random = Random(seed: seed)
      let (path, copy) = (directory.appending("memory"), directory.appending("copy"))
      let pages = Int.random(in: 1...1500, using: &random)
      try makeFile(path, length: pages * 4096, randomParts(pages: pages, &random))
      try RawExport.write(MemoryInput.raw(path), to: copy)
      #expect(try contents(of: copy) == contents(of: path))
      // A filesystem may add a block of its own for what it has to remember.
      #expect(try allocatedBytes(of: copy) <= allocatedBytes(of: path) + 65536)
    }
  }

  @Test("Pages of zeros that were stored become holes")
  func storedZeros() throws {
    try withDirectory { directory in
      let (path, copy) = (directory.appending("memory"), directory.appending("copy"))
      var bytes = [UInt8](repeating: 0, count: 8 << 20)
      bytes[5 << 20] = 1
      bytes[6 << 20 + 4095] = 1
      try makeFile(path, bytes)
      #expect(try allocatedBytes(of: path) >= 8 << 20)
      try RawExport.write(MemoryInput.raw(path), to: copy)
      #expect(try contents(of: copy) == bytes)
      #expect(try MemoryInput.raw(copy).extents(region: 0).map(\.offset) == [5 << 20, 6 << 20])
      #expect(try allocatedBytes(of: copy) <= 65536)
    }
  }

  @Test("Memory of 64 GiB without content is exported in a moment")
  func hugeHole() throws {
    try withDirectory { directory in
      let (path, copy) = (directory.appending("memory"), directory.appending("copy"))
      try makeFile(path, length: 64 << 30, [Part(offset: 64 << 30 - 1, bytes: [1])])
      try RawExport.write(MemoryInput.raw(path, layout: .firecracker()), to: copy)
      let found = try OwnedDescriptor(openingForReading: copy).status
      #expect(found.length == 64 << 30 && found.allocatedBytes <= 65536)
    }
  }

  @Test("Regions are packed, or lie where the guest has them")
  func arrangements() throws {
    try withDirectory { directory in
      let (path, copy) = (directory.appending("memory"), directory.appending("copy"))
      var random = Random(seed: 4)
      let bytes = random.bytes(5 * 4096)
      try makeFile(path, bytes)
      let regions = [(0x20000, 2), (0x10000, 3)].map { address, pages in
        ImageRegion(
          name: "ram", guestAddress: GuestAddress(address), length: pages * 4096,
          pageSize: .size4KiB)
      }
      let input = try MemoryInput.raw(path, layout: .regions(regions))
      try RawExport.write(input, to: copy)
      #expect(try contents(of: copy) == bytes)
      for base in [0, 0x10000] {
        try RawExport.write(input, to: copy, arrangement: .byAddress(base: UInt64(base)))
        let found = try contents(of: copy)
        #expect(found.count == 0x22000 - base)
        #expect(found[(0x20000 - base)...].elementsEqual(bytes[..<8192]))
        #expect(found[(0x10000 - base)..<(0x13000 - base)].elementsEqual(bytes[8192...]))
      }
      let error = importError {
        try RawExport.write(input, to: copy, arrangement: .byAddress(base: 0x11000))
      }
      #expect(error?.code == .invalidLayout)
    }
  }

  @Test("Progress grows from nothing to all")
  func progress() throws {
    try withDirectory { directory in
      let (path, copy) = (directory.appending("memory"), directory.appending("copy"))
      var random = Random(seed: 1)
      try makeFile(path, random.bytes(5 << 20 + 4096))
      let told = Mutex<[Int]>([])
      try RawExport.write(MemoryInput.raw(path), to: copy, threads: 1) { done, total in
        #expect(total == 5 << 20 + 4096)
        told.withLock { $0.append(done) }
      }
      #expect(told.withLock { $0 } == [4 << 20, 5 << 20 + 4096])
    }
  }

  @Test("A source that fails leaves the old file, and nothing else")
  func failingSource() throws {
    try withDirectory { directory in
      let path = directory.appending("copy")
      try makeFile(path, [1, 2, 3])
      let region = ImageRegion(
        name: "ram", guestAddress: GuestAddress(0), length: 4 << 20, pageSize: .size4KiB)
      let error = importError {
        try RawExport.write(FailingSource(regions: [region], limit: 2 << 20), to: path)
      }
      #expect(error?.code == .source)
      #expect(error?.cause is FailingSource.Failure)
      #expect(try contents(of: path) == [1, 2, 3])
      #expect(try names(in: directory.string) == ["copy"])
    }
  }

  @Test(
    "A full disk is an error with advice; the old file is intact and nothing is left",
    .enabled(if: Host.hasPrivileges, "mounting a small filesystem takes root"))
  func fullDisk() throws {
    try withDirectory { directory in
      let mounted = directory.appending("small")
      try FileManager.default.createDirectory(
        atPath: mounted.string, withIntermediateDirectories: false)
      try #require(
        unsafe mount("tmpfs", mounted.string, "tmpfs", 0, "size=1m") == 0,
        "mount: \(Errno(rawValue: errno))")
      defer { _ = unsafe umount2(mounted.string, Int32(MNT_DETACH)) }
      let target = mounted.appending("copy")
      try makeFile(target, [1, 2, 3])
      let region = ImageRegion(
        name: "ram", guestAddress: GuestAddress(0), length: 4 << 20, pageSize: .size4KiB)
      let error = importError {
        try RawExport.write(FailingSource(regions: [region], limit: .max), to: target)
      }
      #expect(error?.code == .inputOutput)
      #expect(error?.errno == .noSpace)
      #expect(error?.description.contains("Free space") == true)
      #expect(try contents(of: target) == [1, 2, 3])
      #expect(try names(in: mounted.string) == ["copy"])
      // The space is free again.
      try makeFile(mounted.appending("more"), [UInt8](repeating: 1, count: 900_000))
    }
  }

  @Test("What is no regular file is not replaced", arguments: ["/dev/null", "/tmp"])
  func irregularTarget(path: String) throws {
    try withDirectory { directory in
      let source = directory.appending("memory")
      try makeFile(source, length: 4096)
      let input = try MemoryInput.raw(source)
      #expect(
        importError { try RawExport.write(input, to: FilePath(path)) }?.code == .inputOutput)
    }
  }

  @Test("Importing, exporting and failing leave no descriptor open")
  func descriptors() async {
    await #expect(processExitsWith: .success) {
      try withDirectory { directory in
        let (path, copy) = (directory.appending("memory"), directory.appending("copy"))
        try makeFile(path, length: 1 << 20)
        try RawExport.write(MemoryInput.raw(path), to: copy)
        let before = openDescriptorCount()
        for _ in 0..<3 {
          let input = try MemoryInput.firecracker(memory: path, diffs: [copy, path])
          try RawExport.write(input, to: directory.appending("third"))
          // What is read.
          _ = importError { try RawExport.write(input, to: copy) }
          _ = importError { _ = try MemoryInput.raw(directory) }
          _ = importError { _ = try CoreFile(path) }
          _ = importError { try RawExport.write(input, to: directory) }
        }
        #expect(openDescriptorCount() == before)
      }
    }
  }
}
