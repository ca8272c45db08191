// SPDX-License-Identifier: Apache-2.0

import Foundation
import LinuxSystem
import MemoryImage
import SystemPackage
import TestSupport
import Testing

@Suite("faultline image")
struct ImageCommandTests {
  private func makeRaw(_ path: String, pages: Int, seed: Int) throws {
    var bytes = Data(count: pages * 4096)
    for page in stride(from: 0, to: pages, by: 3) {
      bytes.replaceSubrange(
        page * 4096..<page * 4096 + 64, with: Data(repeating: UInt8((page + seed) % 251), count: 64)
      )
    }
    try bytes.write(to: URL(fileURLWithPath: path))
  }

  private struct Info: Decodable {
    struct Region: Decodable {
      let bytes: Int
      let inheritedBytes: Int
    }
    let encoding: String
    let regions: [Region]
    let contentID: String
  }

  @Test("create, info, verify, merge and export work together", arguments: ["0", "1", "9"])
  func together(level: String) throws {
    try withTemporaryDirectory { directory in
      let (a, b) = ("\(directory)/a", "\(directory)/b")
      try makeRaw(a, pages: 600, seed: 0)
      var changed = try Data(contentsOf: URL(fileURLWithPath: a))
      changed.replaceSubrange(4096 * 5..<4096 * 5 + 8, with: Data(repeating: 9, count: 8))
      try changed.write(to: URL(fileURLWithPath: b))
      let steps = [
        ["create", "--from-raw", a, "-o", "\(a).img", "--level", level],
        ["create", "--from-raw", b, "--parent", "\(a).img", "-o", "\(b).img", "--level", level],
        ["verify", "\(b).img"],
        ["merge", "\(b).img", "-o", "\(directory)/m.img", "--chunk", "32"],
        ["export", "\(directory)/m.img", "-o", "\(directory)/out"],
      ]
      for step in steps {
        let outcome = try faultline(["image"] + step)
        #expect(outcome.ending == .exit(0), "\(outcome)")
        #expect(outcome.errors.isEmpty)
        #expect(outcome.lines.count == 1)
      }
      #expect(try Data(contentsOf: URL(fileURLWithPath: "\(directory)/out")) == changed)
      let info: Info = try faultline("image", "info", "\(b).img", "--json").json()
      #expect(info.encoding == (level == "0" ? "stored" : "zstd"))
      #expect(info.regions.map(\.bytes) == [600 * 4096])
      #expect(info.regions[0].inheritedBytes > 100 * 4096)
      #expect(info.contentID.count == 64)
      let text = try faultline("image", "info", "\(b).img")
      #expect(text.output.contains("builds on   "))
    }
  }

  private struct Sizes: Decodable {
    let guestBytes: Int
    let zeroBytes: Int
    let ownBytes: Int
    let inheritedBytes: Int
    let metadata: [String: String]
  }

  @Test("info adds up, and spells out what a terminal would obey")
  func info() throws {
    try withTemporaryDirectory { directory in
      let path = FilePath("\(directory)/image")
      let name = "ram\u{1b}[31m"
      var writer = try ImageWriter(
        path: path,
        regions: [
          ImageRegion(
            name: name, guestAddress: GuestAddress(1 << 32), length: 4 << 20, pageSize: .size2MiB)
        ])
      try unsafe [UInt8](repeating: 3, count: 8192).withUnsafeBytes {
        try unsafe writer.write(region: 0, firstBlock: 7, bytes: $0)
      }
      try writer.setMetadata(key: "a\r", value: "b\u{202e}c")
      try writer.finish()
      let text = try faultline("image", "info", path.string)
      for words in [
        "ram\\u{1B}[31m: 4.0 MiB at 0x100000000, pages of 2.0 MiB", "a\\r = b\\u{202E}c",
        "working set none", "8 KiB data of its own", "ratio",
      ] {
        #expect(text.output.contains(words), "\(text)")
      }
      let sizes: Sizes = try faultline("image", "info", path.string, "--json").json()
      #expect(sizes.guestBytes == 4 << 20 && sizes.ownBytes == 8192 && sizes.inheritedBytes == 0)
      #expect(sizes.zeroBytes == sizes.guestBytes - 8192)
      #expect(sizes.metadata == ["a\r": "b\u{202e}c"])
    }
  }

  @Test("verify exits with 2 and names what is damaged")
  func damage() throws {
    try withImage { image in
      let block = try image.damageBlock(from: 700)
      let outcome = try faultline("image", "verify", image.path)
      #expect(outcome.ending == .exit(2), "\(outcome)")
      let address = String(block * 4096, radix: 16)
      #expect(outcome.output.contains("0x\(address)"))
      #expect(outcome.lines.last?.hasSuffix("1 damaged") == true)
    }
  }

  @Test("Wrong input is refused by name, and leaves nothing")
  func refusals() throws {
    try withTemporaryDirectory { directory in
      let raw = "\(directory)/raw"
      try makeRaw(raw, pages: 10, seed: 1)
      let out = "\(directory)/out"
      try faultline("image", "create", "--from-raw", "\(directory)/no", "-o", out)
        .expectFailure(1, saying: ["\(directory)/no"])
      try faultline("image", "create", "--from-raw", raw, "--parent", raw, "-o", out)
        .expectFailure(1, saying: [raw, "does not begin as an image does"])
      try faultline("image", "info", raw).expectFailure(1, saying: [raw])
      #expect(
        try faultline("image", "create", "--from-raw", raw, "-o", out, "--chunk", "5").ending
          == .exit(64))
      #expect(
        try faultline("image", "create", "--from-raw", raw, "-o", out, "--level", "20").ending
          == .exit(64))
      #expect(try FileManager.default.contentsOfDirectory(atPath: directory) == ["raw"])
    }
  }
}
