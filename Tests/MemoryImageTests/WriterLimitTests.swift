// SPDX-License-Identifier: Apache-2.0

import LinuxSystem
import MemoryImage
import SystemPackage
import TestSupport
import Testing

@Suite("A writer refuses what the format cannot hold")
struct WriterLimitTests {
  private static func region(
    _ address: UInt64 = 0, _ length: Int = 4096, _ pageSize: PageSize = .size4KiB,
    name: String = "ram"
  ) -> ImageRegion {
    ImageRegion(
      name: name, guestAddress: GuestAddress(address), length: length, pageSize: pageSize)
  }

  struct Refused: Sendable, CustomTestStringConvertible {
    let testDescription: String
    let code: ImageError.Code
    let regions: [ImageRegion]

    init(_ what: String, _ code: ImageError.Code, _ regions: [ImageRegion]) {
      testDescription = what
      self.code = code
      self.regions = regions
    }
  }

  @Test(
    "Regions that break the rules",
    arguments: [
      Refused("none", .invalidLayout, []),
      Refused("no length", .invalidLayout, [region(0, 0)]),
      Refused("a negative length", .invalidLayout, [region(0, -4096)]),
      Refused("an odd length", .invalidLayout, [region(0, 100)]),
      Refused("less than a page", .invalidLayout, [region(0, 4096, .size2MiB)]),
      Refused("an odd address", .invalidLayout, [region(1)]),
      Refused("past the end of the address space", .invalidLayout, [region(.max - 4095, 8192)]),
      Refused("no name", .invalidLayout, [region(name: "")]),
      Refused(
        "a long name", .invalidLayout, [region(name: String(repeating: "n", count: 81))]),
      Refused("an overlap", .invalidLayout, [region(0, 8192), region(4096)]),
      Refused("an overlap in disorder", .invalidLayout, [region(4096), region(0, 8192)]),
      Refused("2 PiB", .limitExceeded, [region(0, 1 << 51)]),
      Refused("1 PiB, with nothing left for the tables", .limitExceeded, [region(0, 1 << 50)]),
      Refused("1025", .limitExceeded, (0...1024).map { region(UInt64($0) * 4096) }),
    ])
  func regions(refused: Refused) throws {
    try withTemporaryDirectory { directory in
      let path = FilePath(directory).appending("image")
      let error = imageError { _ = try ImageWriter(path: path, regions: refused.regions) }
      #expect(error?.code == refused.code)
    }
  }

  @Test("The greatest number of regions, the last at the end of the address space, works")
  func greatestRegions() throws {
    try withTemporaryDirectory { directory in
      let path = FilePath(directory).appending("image")
      let regions =
        (0..<1023).map { Self.region(UInt64($0) * 4096) }
        + [Self.region(.max - 4095, name: String(repeating: "n", count: 80))]
      try ImageWriter(path: path, regions: regions).finish()
      #expect(try MemoryImage(path: path).regions == regions)
    }
  }

  @Test("Device states: doubled, too many, too large")
  func states() throws {
    try withTemporaryDirectory { directory in
      let path = FilePath(directory).appending("image")
      var writer = try ImageWriter(path: path, regions: [Self.region()])
      try writer.add(state: DeviceState(type: 0, instance: 0, bytes: [1]))
      let doubled = imageError {
        try writer.add(state: DeviceState(type: 0, instance: 0, bytes: []))
      }
      #expect(doubled?.code == .invalidLayout)
      let large = [UInt8](repeating: 0, count: ImageLimits.stateBytes)
      let tooLarge = imageError {
        try writer.add(state: DeviceState(type: 0, instance: 1, bytes: large))
      }
      #expect(tooLarge?.code == .limitExceeded)
      for instance in 1..<UInt32(ImageLimits.states) {
        try writer.add(state: DeviceState(type: 1, instance: instance, bytes: []))
      }
      let tooMany = imageError {
        try writer.add(state: DeviceState(type: 2, instance: 0, bytes: []))
      }
      #expect(tooMany?.code == .limitExceeded)
      try writer.finish()
      #expect(try MemoryImage(path: path).states.count == ImageLimits.states)
    }
  }

  @Test("Metadata: replaced, spelled differently, too long, too many, too large")
  func metadata() throws {
    try withTemporaryDirectory { directory in
      let path = FilePath(directory).appending("image")
      var writer = try ImageWriter(path: path, regions: [Self.region()])
      try writer.setMetadata(key: "caf\u{E9}", value: "old")
      try writer.setMetadata(key: "cafe\u{301}", value: "new")
      for (key, value) in [
        ("", ""), (String(repeating: "k", count: 256), ""),
        ("large", String(repeating: "v", count: ImageLimits.metadataBytes)),
      ] {
        let error = imageError { try writer.setMetadata(key: key, value: value) }
        #expect(error?.code == .limitExceeded)
      }
      for number in 1..<ImageLimits.metadataEntries {
        try writer.setMetadata(key: "key \(number)", value: "")
      }
      let tooMany = imageError { try writer.setMetadata(key: "one more", value: "") }
      #expect(tooMany?.code == .limitExceeded)
      try writer.setMetadata(key: "key 1", value: "again")
      try writer.finish()
      let metadata = try MemoryImage(path: path).metadata
      #expect(metadata.count == ImageLimits.metadataEntries)
      #expect(metadata["caf\u{E9}"] == "new")
      #expect(metadata["key 1"] == "again")
    }
  }
}
