// SPDX-License-Identifier: Apache-2.0

import Foundation
import TestSupport
import Testing

private let gcore = "/usr/bin/gcore"

@Suite("faultline image create and export")
struct ImageCreateTests {
  private struct Info: Decodable {
    struct Region: Decodable {
      let name: String
      let guestAddress: UInt64
      let bytes: Int
      let ownBytes: Int
    }
    let regions: [Region]
  }

  @Test("A Firecracker memory file with its diffs becomes the memory after the last diff")
  func firecracker() throws {
    try withTemporaryDirectory { directory in
      let (memory, image) = ("\(directory)/memory", "\(directory)/image")
      try makeRaw(memory, pages: 3000, data: 0..<40)
      try makeRaw("\(directory)/diff1", pages: 3000, data: [5, 6, 2000], seed: 2)
      try makeRaw("\(directory)/diff2", pages: 3000, data: [6, 7], seed: 3)
      try makeImage("create", "--from-firecracker", memory, "-o", "\(directory)/base")
      try makeImage(
        "create", "--from-firecracker", memory, "--diff", "\(directory)/diff1", "--diff",
        "\(directory)/diff2", "--parent", "\(directory)/base", "-o", image)
      try makeImage("export", image, "-o", "\(directory)/back")
      var expected = try contents(of: memory)
      for (diff, pages) in [("diff1", [5, 6, 2000]), ("diff2", [6, 7])] {
        let bytes = try contents(of: "\(directory)/\(diff)")
        for page in pages {
          let range = page * 4096..<(page + 1) * 4096
          expected.replaceSubrange(range, with: bytes[range])
        }
      }
      #expect(try contents(of: "\(directory)/back") == expected)
      let info: Info = try faultline("image", "info", image, "--json").json()
      #expect(info.regions.map(\.ownBytes) == [4 * 4096])
      let size = try FileManager.default.attributesOfItem(atPath: "\(directory)/back")
      #expect(size[.size] as? Int == 3000 * 4096)
    }
  }

  @Test(
    "A guest with more memory than fits below the gap goes on at 4 GiB",
    arguments: [([], 3072), (["--gap", "3G"], 3072), (["--gap", "3328M"], 3328)])
  func gap(options: [String], below: Int) throws {
    try withTemporaryDirectory { directory in
      let (memory, image) = ("\(directory)/memory", "\(directory)/image")
      try makeRaw(memory, pages: 3400 << 8, data: [0, (3400 << 8) - 1])
      let outcome = try faultline(
        ["image", "create", "--from-firecracker", memory, "-o", image] + options)
      #expect(outcome.ending == .exit(0), "\(outcome)")
      let info: Info = try faultline("image", "info", image, "--json").json()
      #expect(info.regions.map(\.guestAddress) == [0, 4 << 30])
      #expect(info.regions.map(\.bytes) == [below << 20, (3400 - below) << 20])
    }
  }

  @Test(
    "A core of gcore becomes an image; one that was cut is refused",
    .enabled(if: FileManager.default.isExecutableFile(atPath: gcore), "needs gcore (package gdb)"),
    .enabled(if: Host.hasPrivileges, "attaching to a process takes root"))
  func core() throws {
    try withTemporaryDirectory { directory in
      let sleeper = try Command(of: "/bin/sleep", ["600"])
      let dumped = try Command(
        of: gcore, ["-o", "\(directory)/core", "\(sleeper.identifier)"]
      ).wait()
      try #require(dumped.ending == .exit(0), "\(dumped)")
      let (core, image) = ("\(directory)/core.\(sleeper.identifier)", "\(directory)/image")
      let outcome = try faultline("image", "create", "--from-core", core, "-o", image)
      #expect(outcome.ending == .exit(0), "\(outcome)")
      #expect(try faultline("image", "verify", image).ending == .exit(0))
      let info: Info = try faultline("image", "info", image, "--json").json()
      let names = info.regions.map(\.name)
      #expect(names.count > 3 && names.allSatisfy { $0.hasPrefix("map@0x") })
      try makeImage("export", image, "-o", "\(directory)/back")
      let back = try FileManager.default.attributesOfItem(atPath: "\(directory)/back")
      #expect(back[.size] as? Int == info.regions.reduce(0) { $0 + $1.bytes })

      let handle = try FileHandle(forUpdating: URL(fileURLWithPath: core))
      try handle.truncate(atOffset: try handle.seekToEnd() / 2)
      try handle.close()
      try faultline("image", "create", "--from-core", core, "-o", "\(directory)/no")
        .expectFailure(1, saying: [core, "but the file has"])
      #expect(!FileManager.default.fileExists(atPath: "\(directory)/no"))
    }
  }

  @Test("What cannot be read is refused by name, and nothing is left")
  func refusals() throws {
    try withTemporaryDirectory { directory in
      let (raw, other) = ("\(directory)/raw", "\(directory)/other")
      let out = "\(directory)/out"
      try makeRaw(raw, pages: 10, data: [1])
      try makeRaw(other, pages: 11, data: [1])
      func refuse(_ options: [String], _ words: [String]) throws {
        try faultline(["image", "create", "-o", out] + options).expectFailure(1, saying: words)
      }
      for option in ["--from-raw", "--from-firecracker", "--from-core"] {
        try refuse([option, "\(directory)/no"], ["\(directory)/no", "No such file"])
        try refuse([option, directory], [directory, "it is a directory"])
      }
      try refuse(["--from-core", raw], [raw, "does not begin as an ELF file"])
      try refuse(
        ["--from-core", Command.executable], [Command.executable, "not a core"])
      try refuse(
        ["--from-firecracker", raw, "--diff", other],
        [other, "45056", "as long as the memory file"])
      try refuse(
        ["--from-raw", raw, "--parent", "\(directory)/no"], ["\(directory)/no", "No such file"])
      try refuse(["--from-raw", raw, "-o", "\(directory)/no/image"], ["No such file"])
      try makeImage("create", "--from-raw", raw, "-o", "\(directory)/base")
      try refuse(["--from-raw", other, "--parent", "\(directory)/base"], ["its regions are not"])
      try faultline("image", "export", raw, "-o", out)
        .expectFailure(1, saying: [raw, "does not begin as an image does"])
      #expect(try names(in: directory) == ["base", "other", "raw"])
    }
  }

  @Test("A file that may not be read is refused", .needsNobody)
  func noPermission() throws {
    try withTemporaryDirectory { directory in
      try Surroundings.open(directory)
      let raw = "\(directory)/raw"
      try makeRaw(raw, pages: 1, data: [0])
      try FileManager.default.setAttributes([.posixPermissions: 0o600], ofItemAtPath: raw)
      for option in ["--from-raw", "--from-firecracker", "--from-core"] {
        try Surroundings.asNobody(["image", "create", option, raw, "-o", "\(directory)/out"])
          .expectFailure(1, saying: [raw, "Permission denied"])
      }
    }
  }

  @Test("A full disk is said, and leaves what was there", .needsMounts)
  func fullDisk() throws {
    try withTemporaryDirectory { directory in
      let (raw, image) = ("\(directory)/raw", "\(directory)/image")
      try makeRaw(raw, pages: 2000, data: 0..<2000)
      try makeImage("create", "--from-raw", raw, "-o", image, "--level", "0")
      for step in [
        "create --from-raw '\(raw)' --level 0", "export '\(image)'",
      ] {
        let outcome = try Surroundings.inFilesystem(
          kibibytes: 1024,
          """
          echo old >"$dir/out"
          "$faultline" image \(step) -o "$dir/out"
          status=$?
          [ "$(cat "$dir/out")" = old ] && [ "$(ls -A "$dir")" = out ] || exit 98
          exit $status
          """)
        outcome.expectFailure(1, saying: ["No space left", "Free space"])
      }
    }
  }

  @Test(
    "Inputs that do not go together are wrong usage",
    arguments: [
      ([], "--from-raw"),
      (["--from-raw", "a", "--from-core", "b"], "--from-raw"),
      (["--from-raw", "a", "--diff", "b"], "--diff"),
      (["--from-core", "a", "--gap", "3G"], "--gap"),
      (["--from-firecracker", "a", "--gap", "1G"], "--gap"),
      (["--from-raw", "a", "--core-of", "guest"], "--core-of"),
      (["--from-core", "a", "--core-of", "me"], "--core-of"),
    ])
  func usage(options: [String], word: String) throws {
    try faultline(["image", "create", "-o", "x"] + options)
      .expectFailure(64, saying: [word, "Usage: faultline image create"])
  }
}
