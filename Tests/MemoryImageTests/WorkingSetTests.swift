// SPDX-License-Identifier: Apache-2.0

import Foundation
import LinuxSystem
import MemoryImage
import SystemPackage
import TestSupport
import Testing

@Suite("The working set stands behind the image and never harms it")
struct WorkingSetTests {
  private let file: ScratchFile
  private let intact: RawImage
  private static let runs = [
    WorkingSetRun(region: 0, firstBlock: 100, blockCount: 20),
    WorkingSetRun(region: 1, firstBlock: 0, blockCount: 8),
    WorkingSetRun(region: 0, firstBlock: 7, blockCount: 1),
  ]

  init() throws {
    intact = try Sample.machineImage.get()
    file = try ScratchFile(intact.bytes)
  }

  private func bytes() throws -> [UInt8] {
    let descriptor = try OwnedDescriptor(openingForReading: file.path)
    var bytes = [UInt8](repeating: 0, count: try descriptor.status.length)
    try unsafe bytes.withUnsafeMutableBytes { try unsafe descriptor.readAll(into: $0, at: 0) }
    return bytes
  }

  @Test("It is read as it was set, replaced, and removed; the image's own bytes never change")
  func roundTrip() throws {
    let image = try MemoryImage(path: file.path)
    #expect(try image.workingSet() == nil)
    for runs in [Self.runs, [Self.runs[1]], Self.runs] {
      try MemoryImage.setWorkingSet(runs, of: file.path)
      // Also for who has the image open.
      #expect(try image.workingSet()?.runs == runs)
      #expect(try MemoryImage(path: file.path).workingSet()?.runs == runs)
      #expect(try bytes().starts(with: intact.bytes))
      #expect(try MemoryImage(path: file.path).contentID == image.contentID)
      #expect(try image.verify().isIntact)
    }
    try MemoryImage.setWorkingSet(nil, of: file.path)
    #expect(try bytes() == intact.bytes)
    #expect(try image.workingSet() == nil)
  }

  @Test("The bytes are those of the document")
  func layout() throws {
    try MemoryImage.setWorkingSet(Self.runs, of: file.path)
    var entries: [UInt8] = []
    for run in Self.runs {
      entries += RawImage.littleEndian(UInt64(run.region) | UInt64(run.blockCount) << 32)
      entries += RawImage.littleEndian(UInt64(run.firstBlock))
    }
    let seed = intact.key(9)
    var header = Array("FLWORKS\n".utf8) + RawImage.littleEndian(3)
    header += RawImage.littleEndian(RawImage.hash(entries, seed: seed))
    header += RawImage.littleEndian(RawImage.hash(header, seed: seed))
    #expect(try bytes() == intact.bytes + header + entries)
  }

  @Test("Runs that continue each other become one")
  func joined() throws {
    let set = WorkingSet(
      [
        WorkingSetRun(region: 0, firstBlock: 3, blockCount: 1),
        WorkingSetRun(region: 0, firstBlock: 4, blockCount: 2),
        WorkingSetRun(region: 0, firstBlock: 1, blockCount: 1),
      ], of: intactRegions)
    #expect(
      set?.runs == [
        WorkingSetRun(region: 0, firstBlock: 3, blockCount: 3),
        WorkingSetRun(region: 0, firstBlock: 1, blockCount: 1),
      ])
    #expect(set?.blockCount == 4)
  }

  private var intactRegions: [ImageRegion] { Sample.machine.regions }

  @Test(
    "Blocks that the image does not have, and blocks that occur twice, are refused",
    arguments: [
      [WorkingSetRun(region: 2, firstBlock: 0, blockCount: 1)],
      [WorkingSetRun(region: -1, firstBlock: 0, blockCount: 1)],
      [WorkingSetRun(region: 1, firstBlock: 8, blockCount: 1)],
      [WorkingSetRun(region: 1, firstBlock: 7, blockCount: 2)],
      [WorkingSetRun(region: 0, firstBlock: .max, blockCount: 1)],
      [WorkingSetRun(region: 0, firstBlock: 1, blockCount: .max)],
      [WorkingSetRun(region: 0, firstBlock: 1, blockCount: 0)],
      [
        WorkingSetRun(region: 0, firstBlock: 1, blockCount: 5),
        WorkingSetRun(region: 0, firstBlock: 5, blockCount: 1),
      ],
    ])
  func refused(runs: [WorkingSetRun]) throws {
    let error = imageError { try MemoryImage.setWorkingSet(runs, of: file.path) }
    #expect(error?.code == .invalidArgument)
    #expect(try bytes() == intact.bytes)
  }

  @Test("More than 2^28 blocks are refused at once")
  func mostBlocks() {
    let large = ImageRegion(
      name: "ram", guestAddress: GuestAddress(0), length: 1 << 48, pageSize: .size4KiB)
    let run = WorkingSetRun(region: 0, firstBlock: 0, blockCount: 1 << 28 + 1)
    #expect(WorkingSet([run], of: [large]) == nil)
  }

  @Test("A set that lies with right checksums is refused, in bounded memory")
  func lies() throws {
    let seed = intact.key(9)
    for (region, count, first) in [(5, 1, 0), (0, 0, 0), (0, 0xFFFF_FFFF, 0), (0, 1, Int.max)] {
      var entry = RawImage.littleEndian(UInt64(region) | UInt64(count) << 32)
      entry += RawImage.littleEndian(UInt64(first))
      var header = Array("FLWORKS\n".utf8) + RawImage.littleEndian(1)
      header += RawImage.littleEndian(RawImage.hash(entry, seed: seed))
      header += RawImage.littleEndian(RawImage.hash(header, seed: seed))
      let other = try ScratchFile(intact.bytes + header + entry)
      let image = try MemoryImage(path: other.path)
      #expect(imageError { _ = try image.workingSet() }?.code == .invalidLayout)
    }
    // A number of runs that the file has not.
    var header = Array("FLWORKS\n".utf8) + RawImage.littleEndian(1 << 24)
    header += RawImage.littleEndian(1)
    header += RawImage.littleEndian(RawImage.hash(header, seed: seed))
    let other = try ScratchFile(intact.bytes + header)
    let image = try MemoryImage(path: other.path)
    #expect(imageError { _ = try image.workingSet() }?.code == .damaged)
  }

  @Test("Cut anywhere, it is none, and the image is as good as before")
  func cut() throws {
    try MemoryImage.setWorkingSet(Self.runs, of: file.path)
    let whole = try bytes()
    for length in intact.bytes.count + 1..<whole.count {
      try file.setLength(length)
      let image = try MemoryImage(path: file.path)
      #expect(imageError { _ = try image.workingSet() }?.code == .damaged)
      let report = try image.verify()
      #expect(report.damagedBlocks == 0)
      #expect(report.workingSetFailure != nil && !report.isIntact)
    }
    // And it can be set again.
    try MemoryImage.setWorkingSet(Self.runs, of: file.path)
    #expect(try bytes() == whole)
  }

  @Test("Each flipped bit is found")
  func flipped() throws {
    try MemoryImage.setWorkingSet(Self.runs, of: file.path)
    let whole = try bytes()
    for offset in intact.bytes.count..<whole.count {
      var damaged = whole
      damaged[offset] ^= 1 << UInt8(offset % 8)
      let other = try ScratchFile(damaged)
      let image = try MemoryImage(path: other.path)
      #expect(imageError { _ = try image.workingSet() } != nil, "byte \(offset)")
    }
  }

  @Test("Who writes at the same time is refused")
  func locked() throws {
    let holder = try OwnedDescriptor(openingForUpdate: file.path)
    #expect(try holder.lockExclusively())
    let error = imageError { try MemoryImage.setWorkingSet(Self.runs, of: file.path) }
    #expect(error?.code == .incomplete)
    #expect(try bytes() == intact.bytes)
  }

  @Test("A merged image has it, too")
  func merged() throws {
    try MemoryImage.setWorkingSet(Self.runs, of: file.path)
    try withTemporaryDirectory { directory in
      let path = FilePath("\(directory)/merged.img")
      try MemoryImage(path: file.path).merge(to: path)
      #expect(try MemoryImage(path: path).workingSet()?.runs == Self.runs)
    }
  }

  @Test("Whoever is killed while setting one leaves the image, and the new set, none or the old")
  func killed() async throws {
    try await withKillDirectory { directory in
      let path = FilePath(directory).appending("image")
      try Sample.machine.write(to: path)
      try MemoryImage.setWorkingSet(Self.runs, of: path)
      for delay in 0..<8 {
        await #expect(processExitsWith: .signal(SIGKILL)) {
          [directory = directory as String, delay = delay as Int] in
          let killer = try NamedThread(name: "kill") {
            usleep(UInt32(300 * delay))
            kill(getpid(), SIGKILL)
          }
          let path = FilePath(directory).appending("image")
          while true {
            try MemoryImage.setWorkingSet(Self.runs, of: path)
            try MemoryImage.setWorkingSet([Self.runs[1]], of: path)
          }
          killer.join()
        }
        let image = try MemoryImage(path: path)
        var set: WorkingSet?
        let error = imageError { set = try image.workingSet() }
        if error == nil {
          #expect([nil, Self.runs, [Self.runs[1]]].contains(set?.runs))
        } else {
          #expect(error?.code == .damaged)
        }
        #expect(Sample.machine.compare(with: image).right == 2068)
        #expect(try image.verify().damagedBlocks == 0)
        // The lock went with the process.
        try MemoryImage.setWorkingSet(Self.runs, of: path)
      }
    }
  }

  private func withKillDirectory(_ body: (String) async throws -> Void) async throws {
    let directory = FileManager.default.temporaryDirectory.appendingPathComponent(
      "faultline-working-set-\(UUID().uuidString)"
    ).path
    try FileManager.default.createDirectory(atPath: directory, withIntermediateDirectories: false)
    defer { try? FileManager.default.removeItem(atPath: directory) }
    try await body(directory)
  }
}
