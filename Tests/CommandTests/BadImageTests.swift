// SPDX-License-Identifier: Apache-2.0

import Foundation
import TestSupport
import Testing

@Suite("restore of what is no good image")
struct BadImageTests {
  @Test("A missing file, a directory and other files are refused by name and reason")
  func notAnImage() throws {
    try withTemporaryDirectory { directory in
      let empty = "\(directory)/empty"
      let text = "\(directory)/text"
      let zeros = "\(directory)/zeros"
      try Data().write(to: URL(fileURLWithPath: empty))
      try Data(String(repeating: "Dear guest,\n", count: 1000).utf8).write(
        to: URL(fileURLWithPath: text))
      try Data(count: 100_000).write(to: URL(fileURLWithPath: zeros))
      for (path, reason) in [
        ("\(directory)/missing.img", "No such file or directory"),
        ("\(empty)/guest.img", "Not a directory"),
        (directory, "not a regular file"),
        (empty, "does not begin as an image does"),
        (text, "does not begin as an image does"),
        (zeros, "does not begin as an image does"),
        ("/dev/null", "not a regular file"),
        ("/dev/zero", "not a regular file"),
      ] {
        try faultline("restore", path).expectFailure(1, saying: [path, reason])
        try faultline("restore", path, "--json").expectFailure(1, saying: [path, reason])
      }
    }
  }

  @Test("A FIFO that nobody writes to is refused, not waited for")
  func fifo() throws {
    try withTemporaryDirectory { directory in
      let path = "\(directory)/fifo"
      try #require(unsafe mkfifo(path, 0o600) == 0)
      let outcome = try Command(["restore", path]).wait(seconds: 60)
      outcome.expectFailure(1, saying: [path, "not a regular file"])
    }
  }

  @Test("A cut image is refused whatever its length")
  func truncated() throws {
    try withImage { image in
      let length = try image.length
      let reason = "that were written"
      for cut in [length - 1, length - 4096, length / 2, 28672, 8192, 4224, 4096] {
        try image.truncate(to: cut)
        try image.restore().expectFailure(1, saying: [image.path, "\(cut)", "\(length)", reason])
      }
      for cut: UInt64 in [4095, 100, 8, 1] {
        try image.truncate(to: cut)
        try image.restore().expectFailure(1, saying: [image.path, "\(cut) bytes"])
      }
    }
  }

  @Test("Something appended to an image is no working set, and harms nothing else")
  func extended() throws {
    try withImage { image in
      try image.write(Data([0]), at: try image.length)
      #expect(try image.restore().ending == .exit(0))
      #expect(try faultline("image", "verify", image.path).ending == .exit(2))
    }
  }

  @Test("A wrong magic number and an unknown version are told apart from damage")
  func foreign() throws {
    try withImage { image in
      let start = try image.read(at: 0, count: 16)
      try image.flip(byteAt: 3)
      try image.restore().expectFailure(
        1, saying: [image.path, "does not begin as an image does"])
      try image.write(start, at: 0)
      try image.write(Data([3, 0, 0, 0]), at: 8)
      try image.restore().expectFailure(1, saying: [image.path, "version 3", "reads 2"])
      try image.write(start, at: 0)
      #expect(try image.restore().ending == .exit(0))
    }
  }

  @Test("A flipped byte of the header is found, wherever it is")
  func header() throws {
    try withImage(mebibytes: 2) { image in
      for offset: UInt64 in [12, 16, 24, 40, 44, 48, 52, 56, 64, 80, 104, 127, 128, 4087, 4095] {
        try image.flip(byteAt: offset)
        try image.restore().expectFailure(1, saying: [image.path, "the header"])
        try image.flip(byteAt: offset)
      }
      #expect(try image.restore().ending == .exit(0))
    }
  }

  @Test("A flipped byte of the region table, the vCPU states and the metadata is found")
  func tables() throws {
    try withImage(mebibytes: 2) { image in
      let length = try image.length
      for offset in [4096, 4136, 4223, length - 1] {
        try image.flip(byteAt: offset)
        try image.restore().expectFailure(1, saying: [image.path, "checksum"])
        try image.flip(byteAt: offset)
      }
      #expect(try image.restore().ending == .exit(0))
    }
  }

  @Test("An image without permission to read is refused by name", .needsNobody)
  func unreadable() throws {
    try withImage(mebibytes: 2) { image in
      try Surroundings.open(image.directory)
      let outcome = try Surroundings.asNobody(["restore", image.path])
      outcome.expectFailure(1, saying: [image.path, "Permission denied"])
    }
  }

  @Test(
    "A readable image without the right to a userfaultfd: it says how to get it", .needsNobody,
    .enabled(
      if: !Surroundings.nobodyHasUserfaultfd, "every user has userfaultfd on this machine"))
  func noUserfaultfd() throws {
    try withImage(mebibytes: 2) { image in
      try Surroundings.open(image.directory)
      try Surroundings.open(image.path)
      let outcome = try Surroundings.asNobody(["restore", image.path])
      outcome.expectFailure(
        1, saying: ["userfaultfd", "not permitted", "vm.unprivileged_userfaultfd=1"])
    }
  }

  @Test("Memory that cannot be served as asked is refused with the reason")
  func impossibleMemory() throws {
    try withImage(mebibytes: 2) { image in
      try image.restore("--faults", "minor").expectFailure(
        1, saying: ["anonymous memory has no minor faults", "memfd"])
      try image.restore("--backing", "hugetlb-1G").expectFailure(1, saying: ["1 GiB"])
    }
  }
}
