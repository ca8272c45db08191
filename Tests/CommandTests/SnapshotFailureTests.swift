// SPDX-License-Identifier: Apache-2.0

import Foundation
import TestSupport
import Testing

@Suite("snapshot that cannot succeed")
struct SnapshotFailureTests {
  @Test("A directory that does not exist is named")
  func noDirectory() throws {
    try withTemporaryDirectory { directory in
      let path = "\(directory)/nowhere/guest.img"
      try faultline("snapshot", "-o", path, "--memory", "2M", "--guest", "process")
        .expectFailure(1, saying: [path, "No such file or directory"])
      #expect(try names(in: directory).isEmpty)
    }
  }

  @Test("What is no regular file is not replaced")
  func irregularTarget() throws {
    try withTemporaryDirectory { directory in
      let folder = "\(directory)/folder"
      let link = "\(directory)/link"
      try FileManager.default.createDirectory(
        atPath: folder, withIntermediateDirectories: false)
      try FileManager.default.createSymbolicLink(atPath: link, withDestinationPath: "elsewhere")
      for path in [folder, link, "/dev/null"] {
        try faultline("snapshot", "-o", path, "--memory", "2M", "--guest", "process")
          .expectFailure(1, saying: [path])
      }
      #expect(try names(in: directory) == ["folder", "link"])
      #expect(try names(in: folder).isEmpty)
      #expect(try FileManager.default.destinationOfSymbolicLink(atPath: link) == "elsewhere")
    }
  }

  @Test("A directory without permission to write is named", .needsNobody)
  func readOnlyDirectory() throws {
    try withTemporaryDirectory { directory in
      try Surroundings.open(directory)
      let path = "\(directory)/guest.img"
      let outcome = try Surroundings.asNobody([
        "snapshot", "-o", path, "--memory", "2M", "--guest", "process",
      ])
      outcome.expectFailure(1, saying: [path, "Permission denied"])
      #expect(try names(in: directory).isEmpty)
    }
  }

  @Test("A full disk: it is said, and nothing is left", .needsMounts)
  func fullDisk() throws {
    let outcome = try Surroundings.inFilesystem(
      kibibytes: 4096,
      """
      "$faultline" snapshot -o "$dir/guest.img" --memory 16M --guest process
      echo "status $?"
      ls -A "$dir"
      df --output=used "$dir" | tail -n 1 | tr -d ' '
      """)
    #expect(outcome.ending == .exit(0))
    #expect(outcome.output == "status 1\n0\n", "\(outcome)")
    #expect(outcome.errors.contains("/guest.img"))
    #expect(outcome.errors.contains("No space left on device"))
  }

  @Test("A full disk: the image that was there is still there, and good", .needsMounts)
  func fullDiskKeepsOldImage() throws {
    let outcome = try Surroundings.inFilesystem(
      kibibytes: 4096,
      """
      "$faultline" snapshot -o "$dir/guest.img" --memory 2M --guest process >/dev/null || exit 98
      before=$(cksum "$dir/guest.img")
      "$faultline" snapshot -o "$dir/guest.img" --memory 16M --guest process
      echo "status $?"
      [ "$before" = "$(cksum "$dir/guest.img")" ] && echo same
      ls -A "$dir"
      "$faultline" restore "$dir/guest.img" | tail -n 1
      """)
    #expect(
      outcome.output == "status 1\nsame\nguest.img\nguest verified: 256 pages, 0 wrong\n",
      "\(outcome)")
    #expect(outcome.errors.contains("No space left on device"))
  }

  @Test("A read-only filesystem is named", .needsMounts)
  func readOnlyFilesystem() throws {
    let outcome = try Surroundings.inFilesystem(
      kibibytes: 4096,
      """
      mount -o remount,ro "$dir" || exit 98
      "$faultline" snapshot -o "$dir/guest.img" --memory 2M --guest process
      """)
    outcome.expectFailure(1, saying: ["/guest.img", "Read-only file system"])
  }
}
