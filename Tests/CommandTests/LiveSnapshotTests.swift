// SPDX-License-Identifier: Apache-2.0

import TestSupport
import Testing

/// What `snapshot --json` says about an image of a guest that went on.
private struct LiveSaved: Decodable {
  let image: String
  let live: Bool
  let incremental: Bool
  let tracking: String?
  let pages: Int
  let pauseNanoseconds: UInt64
  let snapshotNanoseconds: UInt64
}

@Suite(
  "snapshot of a guest that goes on",
  .enabled(if: Host.hasPrivileges, "needs root to watch the kernel's faults"))
struct LiveSnapshotTests {
  @Test(
    "Each image of a series is restored and verified", arguments: Surroundings.guests,
    [[], ["--live"]])
  func series(_ guest: String, _ live: [String]) throws {
    // A live series needs a tracker of KVM.
    if guest == "process", !live.isEmpty { return }
    try withTemporaryDirectory { directory in
      let outcome = try faultline(
        [
          "snapshot", "-o", "\(directory)/g.img", "--memory", "16M", "--guest", guest,
          "--increments", "2", "--every", "0.05", "--writes", "10", "--json",
        ] + live)
      #expect(outcome.ending == .exit(0), "\(outcome)")
      let images: [LiveSaved] = try outcome.jsonLines()
      #expect(images.map(\.image) == ["g", "g.1", "g.2"].map { "\(directory)/\($0).img" })
      #expect(images.map(\.incremental) == [false, true, true])
      #expect(images.allSatisfy { $0.live == !live.isEmpty && $0.tracking != nil })
      for image in images {
        #expect(image.pauseNanoseconds > 0)
        #expect(image.pauseNanoseconds < image.snapshotNanoseconds)
        let restored = try faultline("restore", image.image)
        #expect(restored.lines.last == "guest verified: 3840 pages, 0 wrong", "\(restored)")
      }
      #expect(images[1].pages < 1500)
    }
  }

  @Test("A live image alone is restored and verified", arguments: Surroundings.guests)
  func alone(_ guest: String) throws {
    try withTemporaryDirectory { directory in
      let path = "\(directory)/g.img"
      let outcome = try faultline(
        "snapshot", "-o", path, "--memory", "16M", "--guest", guest, "--live")
      #expect(outcome.ending == .exit(0), "\(outcome)")
      #expect(outcome.output.contains("paused for"))
      #expect(outcome.output.contains("pages/s meanwhile"))
      let restored = try faultline("restore", path)
      #expect(restored.lines.last == "guest verified: 3840 pages, 0 wrong", "\(restored)")
    }
  }

  @Test("A full disk: it is said, and nothing is left", .needsMounts)
  func fullDisk() throws {
    let outcome = try Surroundings.inFilesystem(
      kibibytes: 4096,
      """
      "$faultline" snapshot -o "$dir/g.img" --memory 16M --guest process --live
      echo "status $?"
      ls -A "$dir"
      """)
    #expect(outcome.output == "status 1\n", "\(outcome)")
    #expect(outcome.errors.contains("No space left on device"))
  }

  @Test(
    "What cannot be is refused before anything is done",
    arguments: [
      ["--tracking", "ring"], ["--increments", "65"], ["--writes", "101"], ["--every", "-1"],
      ["--live", "--increments", "1", "--tracking", "async"],
    ])
  func refused(_ options: [String]) throws {
    try withTemporaryDirectory { directory in
      let outcome = try faultline(["snapshot", "-o", "\(directory)/g.img"] + options)
      #expect(outcome.ending == .exit(64), "\(outcome)")
      #expect(try names(in: directory).isEmpty)
    }
  }
}
