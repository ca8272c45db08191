// SPDX-License-Identifier: Apache-2.0

import Foundation
import TestSupport
import Testing

@Suite("faultline image diff")
struct ImageDiffTests {
  private struct Report: Decodable {
    struct Run: Decodable, Equatable {
      let guestAddress: UInt64
      let pages: Int
    }
    struct Region: Decodable {
      let name: String
      let guestAddress: UInt64
      let bytes: Int
      let presentIn: String
      let pages: Int
      let differingPages: Int
      let differingBytes: Int
      let zeroInFirstOnly: Int
      let zeroInSecondOnly: Int
      let ranges: [Run]?
    }
    let equal: Bool
    let differingPages: Int
    let comparedPages: Int
    let regions: [Region]
  }

  /// Two images, the second on top of the first: page 5 changed, 6 cleared, 3000 to 3063 new.
  private func withImages(_ body: (_ first: String, _ second: String) throws -> Void) throws {
    try withTemporaryDirectory { directory in
      let (first, second) = ("\(directory)/first", "\(directory)/second")
      try makeRaw("\(directory)/1", pages: 4096, data: 0..<40)
      try makeRaw("\(directory)/2", pages: 4096, data: (0..<40).filter { $0 != 5 && $0 != 6 })
      let handle = try FileHandle(forUpdating: URL(fileURLWithPath: "\(directory)/2"))
      for page in [5] + Array(3000..<3064) {
        try handle.seek(toOffset: UInt64(page) * 4096)
        try handle.write(contentsOf: Data([1]))
      }
      try handle.close()
      try makeImage("create", "--from-raw", "\(directory)/1", "-o", first)
      try makeImage("create", "--from-raw", "\(directory)/2", "--parent", first, "-o", second)
      try body(first, second)
    }
  }

  @Test("It counts and lists the pages that differ, and exits with 1")
  func different() throws {
    try withImages { first, second in
      let outcome = try faultline("image", "diff", first, second, "--json", "--list")
      #expect(outcome.ending == .exit(1) && outcome.errors.isEmpty)
      let report: Report = try outcome.json()
      #expect(!report.equal && report.differingPages == 66 && report.comparedPages == 66)
      let region = try #require(report.regions.first)
      #expect(report.regions.count == 1 && region.name == "ram" && region.presentIn == "both")
      #expect((region.pages, region.bytes, region.guestAddress) == (4096, 4096 << 12, 0))
      #expect((region.differingPages, region.differingBytes) == (66, 66 * 4096))
      #expect((region.zeroInFirstOnly, region.zeroInSecondOnly) == (64, 1))
      #expect(
        region.ranges == [
          Report.Run(guestAddress: 5 * 4096, pages: 2),
          Report.Run(guestAddress: 3000 * 4096, pages: 64),
        ])
      let back: Report = try faultline("image", "diff", second, first, "--json").json()
      #expect(back.regions.map(\.zeroInFirstOnly) == [1] && back.regions[0].ranges == nil)
    }
  }

  @Test("As text it has a summary, a line for each region, and a map of plain characters")
  func text() throws {
    try withImages { first, second in
      let outcome = try faultline("image", "diff", first, second, "--list")
      #expect(outcome.ending == .exit(1) && outcome.errors.isEmpty)
      #expect(outcome.lines[0].hasSuffix("66 of 4096 pages differ (264 KiB of 16.0 MiB)"))
      #expect(outcome.lines[1].contains("region ram at 0x0: 66 of 4096 pages differ"))
      #expect(outcome.lines[2...3].elementsEqual(["    0x5000 2", "    0xbb8000 64"]))
      let map = outcome.lines[4...]
      #expect(outcome.output.allSatisfy { $0.isASCII })
      #expect(map.allSatisfy { $0.count <= 80 })
      #expect(map.contains { $0.contains("16 KiB each") })
      // 16 lines of 64 cells of 4 pages.
      let lines = map.filter { $0.hasPrefix("  0x") }
      #expect(lines.count == 16 && lines.allSatisfy { $0.count == 2 + 8 + 2 + 64 })
      #expect(lines.first?.hasPrefix("  0x000000  .+.") == true)
      let cells = lines.map { $0.dropFirst(12) }.joined()
      #expect(cells.dropFirst(750).prefix(16) == String(repeating: "#", count: 16))
      #expect(cells.count { $0 != "." } == 17)
    }
  }

  @Test("On a terminal the map is shaded and fits the width", arguments: [40, 80, 200])
  func terminal(columns: Int) throws {
    try withImages { first, second in
      let typescript = "\(first).typescript"
      let shell =
        "stty cols \(columns) && '\(Command.executable)' image diff '\(first)' '\(second)'"
      // The terminal's output has carriage returns, which `wait` does not like.
      let outcome = try Command(
        of: "/bin/sh", ["-c", "exec script -qefc \"$shell\" \"$typescript\" >/dev/null"],
        environment: ["TERM": "xterm", "shell": shell, "typescript": typescript]
      ).wait()
      #expect(outcome.ending == .exit(1), "\(outcome)")
      let text = String(decoding: try contents(of: typescript), as: UTF8.self)
      let lines = text.split(whereSeparator: \.isNewline).filter { $0.hasPrefix("  0x") }
      #expect((1...16).contains(lines.count) && lines.allSatisfy { $0.count <= columns })
      #expect(lines.joined().contains("█") && lines.joined().contains("·"))
    }
  }

  @Test("Equal memory exits with 0 and has no map", arguments: ["itself", "merged"])
  func equal(other: String) throws {
    try withImages { first, second in
      if other == "merged" { try makeImage("merge", second, "-o", "\(second).whole") }
      let path = other == "merged" ? "\(second).whole" : second
      let outcome = try faultline("image", "diff", second, path)
      #expect(outcome.ending == .exit(0) && outcome.errors.isEmpty)
      #expect(outcome.lines.count == 2 && outcome.lines[0].hasSuffix("equal, 4096 pages"))
      let report: Report = try faultline("image", "diff", second, path, "--json").json()
      #expect(report.equal && report.differingPages == 0)
      #expect(report.comparedPages == 0 || other == "merged")
    }
  }

  @Test("Memory that only one image has is named, and is a difference")
  func regions() throws {
    try withTemporaryDirectory { directory in
      for (name, pages) in [("small", 1024), ("large", 1030)] {
        try makeRaw("\(directory)/\(name).raw", pages: pages, data: 0..<8)
        try makeImage(
          "create", "--from-raw", "\(directory)/\(name).raw", "-o", "\(directory)/\(name)")
      }
      let paths = ["small", "large"].map { "\(directory)/\($0)" }
      let outcome = try faultline(["image", "diff"] + paths)
      #expect(outcome.ending == .exit(1))
      #expect(outcome.lines[0].hasSuffix("24 KiB only in one of them"))
      #expect(outcome.lines[2].hasSuffix("at 0x400000: only in \(paths[1]), 24 KiB"))
      let report: Report = try faultline(["image", "diff", "--json"] + paths).json()
      #expect(report.regions.map(\.presentIn) == ["both", "second"])
      #expect(!report.equal && report.differingPages == 0)
    }
  }

  @Test("What cannot be read exits with 2 and says why")
  func failures() throws {
    try withImage { image in
      let no = "\(image.directory)/no"
      try faultline("image", "diff", image.path, no)
        .expectFailure(2, saying: [no, "No such file"])
      try faultline("image", "diff", Command.executable, image.path)
        .expectFailure(2, saying: [Command.executable, "does not begin as an image does"])
      let whole = "\(image.directory)/whole"
      try makeImage("merge", image.path, "-o", whole)
      _ = try image.damageBlock(from: 700)
      try faultline("image", "diff", image.path, whole, "--json")
        .expectFailure(2, saying: [image.path, "does not match its checksum"])
      try faultline("image", "diff", image.path).expectFailure(64, saying: ["<second>"])
    }
  }
}
