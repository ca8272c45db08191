// SPDX-License-Identifier: Apache-2.0

import Foundation
import TestSupport
import Testing

@Suite("image working-set and verify --sample")
struct WorkingSetCommandTests {
  private struct Shown: Decodable {
    struct Run: Decodable, Equatable {
      let region: Int
      let firstPage: Int
      let pages: Int
    }
    let pages: Int
    let runs: [Run]
  }

  @Test("It is set from text, shown, exported, and removed")
  func roundTrip() throws {
    try withImage(guest: "process") { image in
      let list = "\(image.directory)/pages.txt"
      try "# first\n0 256 16\n\n0 1000 1\n".write(
        toFile: list, atomically: false, encoding: .utf8)
      #expect(
        try faultline("image", "working-set", image.path).output.hasSuffix("no working set\n"))
      let set = try faultline("image", "working-set", image.path, "--set", list)
      #expect(set.ending == .exit(0), "\(set)")
      #expect(set.output.contains("17 pages"))
      let shown: Shown = try faultline("image", "working-set", image.path, "--json").json()
      #expect(shown.pages == 17)
      #expect(
        shown.runs == [
          .init(region: 0, firstPage: 256, pages: 16), .init(region: 0, firstPage: 1000, pages: 1),
        ])
      let text = try faultline("image", "working-set", image.path, "--export")
      #expect(text.output == "0 256 16\n0 1000 1\n")
      #expect(try faultline("image", "info", image.path).output.contains("working set 17 pages ("))
      #expect(try faultline("image", "verify", image.path).ending == .exit(0))
      #expect(try image.restore().ending == .exit(0))
      #expect(try faultline("image", "working-set", image.path, "--remove").ending == .exit(0))
      #expect(
        try faultline("image", "working-set", image.path).output.hasSuffix("no working set\n"))
    }
  }

  @Test("Text that is no working set is refused by line or by reason, and nothing changes")
  func badText() throws {
    try withImage(guest: "process") { image in
      let list = "\(image.directory)/pages.txt"
      for (text, reason) in [
        ("0 256\n", "pages.txt:1"), ("0 1 1\n0 x 1\n", "pages.txt:2"), ("0 -1 1\n", "pages.txt:1"),
        ("1 0 1\n", "may only name blocks"), ("0 5 2\n0 6 1\n", "each once"),
      ] {
        try text.write(toFile: list, atomically: false, encoding: .utf8)
        try faultline("image", "working-set", image.path, "--set", list)
          .expectFailure(1, saying: [reason])
      }
      try faultline("image", "working-set", image.path, "--set", "\(image.directory)/none")
        .expectFailure(1, saying: ["none"])
      #expect(
        try faultline("image", "working-set", image.path).output.hasSuffix("no working set\n"))
    }
  }

  @Test("A damaged one is said by verify and info, and removed; the guest is restored all the same")
  func damaged() throws {
    try withImage(guest: "process") { image in
      let handle = try FileHandle(forWritingTo: URL(fileURLWithPath: image.path))
      try handle.seekToEnd()
      try handle.write(contentsOf: Data("FLWORKS\n".utf8))
      try handle.close()
      let verified = try faultline("image", "verify", image.path)
      #expect(verified.ending == .exit(2))
      #expect(verified.output.contains("--remove"))
      #expect(try faultline("image", "info", image.path).output.contains("cannot be used"))
      #expect(try image.restore().ending == .exit(0))
      #expect(try faultline("image", "working-set", image.path, "--remove").ending == .exit(0))
      #expect(try faultline("image", "verify", image.path).ending == .exit(0))
    }
  }

  @Test("A sample says that it is one")
  func sample() throws {
    try withImage(guest: "process") { image in
      let outcome = try faultline("image", "verify", image.path, "--sample", "50", "--seed", "3")
      #expect(outcome.ending == .exit(0), "\(outcome)")
      #expect(outcome.output.contains("a sample of"))
      #expect(outcome.output.contains("were not looked at"))
      for bad in [["--sample", "0"], ["--sample", "101"], ["--seed", "1"]] {
        #expect(try faultline(["image", "verify", image.path] + bad).ending == .exit(64))
      }
    }
  }
}
