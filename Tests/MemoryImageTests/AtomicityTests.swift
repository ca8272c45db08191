// SPDX-License-Identifier: Apache-2.0

import Foundation
import LinuxSystem
import MemoryImage
import SystemPackage
import TestSupport
import Testing

/// Names in a directory.
private func names(in directory: String) throws -> [String] {
  try FileManager.default.contentsOfDirectory(atPath: directory)
}

@Suite("An image is there completely or not at all")
struct AtomicityTests {
  private let sample = Sample.smallMachine

  @Test("An abandoned writer leaves nothing behind")
  func abandoned() throws {
    try withTemporaryDirectory { directory in
      let path = FilePath(directory).appending("image")
      do {
        let writer = try ImageWriter(path: path, regions: sample.regions)
        try writer.write(region: 0, blocks: sample.data[0])
        #expect(try names(in: directory).isEmpty, "the file has no name while it is written")
      }
      #expect(try names(in: directory).isEmpty)
    }
  }

  @Test("A writer that is killed leaves nothing behind")
  func killed() async throws {
    let directory = FileManager.default.temporaryDirectory.appendingPathComponent(
      "faultline-killed-\(UUID().uuidString)"
    ).path
    try FileManager.default.createDirectory(atPath: directory, withIntermediateDirectories: false)
    defer { try? FileManager.default.removeItem(atPath: directory) }
    await #expect(processExitsWith: .signal(SIGKILL)) { [directory = directory as String] in
      let sample = Sample.smallMachine
      let path = FilePath(directory).appending("image")
      let writer = try ImageWriter(path: path, regions: sample.regions)
      try writer.write(region: 0, blocks: sample.data[0])
      kill(getpid(), SIGKILL)
      try writer.finish()
    }
    #expect(try names(in: directory).isEmpty)
  }

  @Test("Only the owner may read the file")
  func mode() throws {
    try withTemporaryDirectory { directory in
      let path = FilePath(directory).appending("image")
      try sample.write(to: path)
      let attributes = try FileManager.default.attributesOfItem(atPath: path.string)
      #expect(attributes[.posixPermissions] as? Int == 0o600)
      #expect(try names(in: directory) == ["image"])
    }
  }

  @Test("Readers of an image that is replaced keep it; new ones get the new one")
  func replaced() throws {
    try withTemporaryDirectory { directory in
      let path = FilePath(directory).appending("image")
      try sample.write(to: path)
      let old = try MemoryImage(path: path)
      let other = Sample(seed: 99, blocks: [12, 8])
      try other.write(to: path)
      #expect(try names(in: directory) == ["image"])
      #expect(sample.compare(with: old).right == 20)
      let new = try MemoryImage(path: path)
      #expect(new.id != old.id)
      #expect(other.compare(with: new).right == 20)
    }
  }

  @Test("An abandoned writer leaves an older image as it was")
  func abandonedOverOld() throws {
    try withTemporaryDirectory { directory in
      let path = FilePath(directory).appending("image")
      try sample.write(to: path)
      let before = try contents(of: path)
      do {
        let writer = try ImageWriter(path: path, regions: [sample.regions[0]])
        try writer.write(region: 0, firstBlock: 0, Sample.zeroBlock)
      }
      #expect(try names(in: directory) == ["image"])
      #expect(try contents(of: path) == before)
    }
  }

  @Test(
    "A full disk is an error with advice; the old image is intact and nothing is left",
    .enabled(if: Host.hasPrivileges, "mounting a small filesystem takes root"))
  func fullDisk() throws {
    try withTemporaryDirectory { directory in
      try #require(
        unsafe mount("tmpfs", directory, "tmpfs", 0, "size=1m") == 0,
        "mount: \(Errno(rawValue: errno))")
      defer { _ = unsafe umount2(directory, Int32(MNT_DETACH)) }
      let path = FilePath(directory).appending("image")
      try sample.write(to: path)
      let before = try contents(of: path)

      let region = ImageRegion(
        name: "ram", guestAddress: GuestAddress(0), length: 4 << 20, pageSize: .size4KiB)
      var random = SeededRandom(seed: 9)
      let bytes = (0..<1024).flatMap { _ in
        (0..<512).flatMap { _ in RawImage.littleEndian(random.next()) }
      }
      var writer: ImageWriter? = try ImageWriter(path: path, regions: [region])
      let error = imageError { try writer?.write(region: 0, firstBlock: 0, bytes) }
      #expect(error?.code == .inputOutput)
      #expect(error?.errno == .noSpace)
      #expect(error?.description.contains("Free space") == true)
      let finished = imageError { try writer.take()?.finish() }
      #expect(finished?.code == .incomplete, "a writer that lost blocks does not finish")
      #expect(try names(in: directory) == ["image"])
      #expect(try contents(of: path) == before)

      // Full only when the end is written: 1 MiB does not hold this index.
      let large = ImageRegion(
        name: "ram", guestAddress: GuestAddress(0), length: 4 << 30, pageSize: .size4KiB)
      let atEnd = imageError { try ImageWriter(path: path, regions: [large]).finish() }
      #expect(atEnd?.errno == .noSpace)
      #expect(try names(in: directory) == ["image"])
      #expect(try contents(of: path) == before)
    }
  }

  @Test("Blocks written after the end are refused", arguments: [true, false])
  func writeAfterEnd(finished: Bool) throws {
    try withTemporaryDirectory { directory in
      let path = FilePath(directory).appending("image")
      let writer = try ImageWriter(path: path, regions: sample.regions)
      let blocks = writer.blocks
      if finished { try writer.finish() } else { _ = consume writer }
      let error = imageError {
        try unsafe Sample.zeroBlock.withUnsafeBytes {
          try unsafe blocks.write(region: 0, firstBlock: 0, bytes: $0)
        }
      }
      #expect(error?.code == .incomplete)
    }
  }

  @Test(
    "What is not a regular file is not replaced",
    arguments: [
      ("directory", Errno.isDirectory), ("link", .tooManySymbolicLinkLevels), ("pipe", .fileExists),
    ])
  func irregularTarget(kind: String, errno: Errno) throws {
    try withTemporaryDirectory { directory in
      let path = FilePath(directory).appending(kind)
      switch kind {
      case "directory":
        try FileManager.default.createDirectory(
          atPath: path.string, withIntermediateDirectories: false)
      case "link":
        try FileManager.default.createSymbolicLink(
          atPath: path.string, withDestinationPath: "elsewhere")
      default: #expect(unsafe mkfifo(path.string, 0o600) == 0)
      }
      let error = imageError { _ = try ImageWriter(path: path, regions: sample.regions) }
      #expect(error?.code == .inputOutput)
      #expect(error?.errno == errno)
    }
  }

  @Test("A file with a hidden name appears, replaces, and goes away like one without")
  func hiddenName() throws {
    try withTemporaryDirectory { directory in
      let path = FilePath(directory).appending("file")
      for length in [100, 200] {
        let pending = try PendingFile(at: path, unnamed: false)
        let isUnnamed = pending.isUnnamed
        #expect(!isUnnamed)
        try pending.descriptor.setLength(length)
        try pending.publish().synchronize()
        #expect(try contents(of: path).count == length)
        #expect(try names(in: directory) == ["file"])
      }
      do {
        let pending = try PendingFile(at: path, unnamed: false)
        #expect(try names(in: directory).count == 2)
        let isUnnamed = pending.isUnnamed
        #expect(!isUnnamed)
      }
      #expect(try names(in: directory) == ["file"])
    }
  }

  @Test("Writing, reading and failing leave no descriptor open")
  func descriptors() async {
    await #expect(processExitsWith: .success) {
      let sample = Sample.smallMachine
      try withTemporaryDirectory { directory in
        let path = FilePath(directory).appending("image")
        // The first use of a library may open something for good.
        try sample.write(to: path)
        let before = openDescriptorCount()
        for _ in 0..<3 {
          try sample.write(to: path)
          #expect(sample.compare(with: try MemoryImage(path: path)).right == 20)
          #expect(try MemoryImage(path: path).verify().isIntact)
          _ = try ImageWriter(path: path, regions: sample.regions)
          _ = imageError { _ = try MemoryImage(path: "/dev/null") }
          _ = imageError { _ = try ImageWriter(path: FilePath(directory), regions: sample.regions) }
        }
        #expect(openDescriptorCount() == before)
      }
    }
  }
}
