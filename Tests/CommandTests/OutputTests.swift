// SPDX-License-Identifier: Apache-2.0

import Foundation
import TestSupport
import Testing

@Suite("Results that cannot be written are a failure, and no output destroys an input")
struct OutputTests {
  /// Where standard output goes, in the words of a shell.
  private enum Sink: String, CaseIterable {
    case fullDisk = ">/dev/full"
    case closed = ">&-"
    /// So that the next files that are opened would be these.
    case allClosed = "<&- >&- 2>&-"
  }

  private func run(_ arguments: [String], _ sink: Sink) throws -> Outcome {
    try Command(
      of: "/bin/sh",
      ["-c", "exec \"$0\" \"$@\" \(sink.rawValue)", Command.executable] + arguments
    ).wait()
  }

  /// Two images of a chain, and what they were made from.
  private func makeChain(_ directory: String) throws {
    for (name, changed) in [("a", 0), ("b", 5)] {
      var bytes = Data((0..<64 * 4096).map { UInt8(truncatingIfNeeded: $0 / 4096) })
      bytes[changed * 4096] = 0xFF
      try bytes.write(to: URL(fileURLWithPath: "\(directory)/\(name)"))
      let parent = name == "b" ? ["--parent", "\(directory)/a.img"] : []
      let made = try faultline(
        ["image", "create", "--from-raw", "\(directory)/\(name)"] + parent
          + ["-o", "\(directory)/\(name).img"])
      #expect(made.ending == .exit(0), "\(made)")
    }
  }

  private static let verbs = [
    "--help", "--version", "image diff --help", "doctor", "doctor --json",
    "snapshot -o DIR/g.img --memory 4M --guest process",
    "snapshot -o DIR/g.img --memory 4M --guest process --json",
    "image info DIR/b.img", "image info DIR/b.img --json", "image verify DIR/b.img",
    "image verify DIR/b.img --json", "image diff DIR/a.img DIR/b.img",
    "image diff DIR/a.img DIR/a.img --json", "image working-set DIR/a.img",
    "image working-set DIR/a.img --json", "image export DIR/b.img -o DIR/out",
    "image merge DIR/b.img -o DIR/m.img", "image create --from-raw DIR/a -o DIR/c.img",
    "model check --operations 10 --memory tmpfs",
    "model check --operations 10 --memory tmpfs --json",
  ]

  @Test("The exit status is 1, with a reason, whatever was to be printed", arguments: verbs)
  func unwritable(verb: String) throws {
    try withTemporaryDirectory { directory in
      try makeChain(directory)
      let arguments = verb.replacing("DIR", with: directory).split(separator: " ").map(String.init)
      for sink in Sink.allCases {
        let outcome = try run(arguments, sink)
        // diff(1): 1 would mean that they differ.
        #expect(
          outcome.ending == .exit(verb.hasPrefix("image diff DIR") ? 2 : 1), "\(sink): \(outcome)")
        if sink != .allClosed {
          #expect(outcome.errors.contains("standard output cannot be written"), "\(outcome)")
        }
        // What was printed is in no file that was opened meanwhile.
        for image in ["g.img", "m.img", "c.img"]
        where FileManager.default.fileExists(atPath: "\(directory)/\(image)") {
          let check = try faultline("image", "verify", "\(directory)/\(image)")
          #expect(check.ending == .exit(0), "\(check)")
        }
      }
    }
  }

  @Test("A guest that was restored, too")
  func restore() throws {
    try withTemporaryDirectory { directory in
      let image = "\(directory)/g.img"
      let made = try faultline(
        "snapshot", "-o", image, "--memory", "4M", "--guest", "process")
      #expect(made.ending == .exit(0), "\(made)")
      for more in [[], ["--json"]] {
        for sink in Sink.allCases {
          #expect(try run(["restore", image] + more, sink).ending == .exit(1))
        }
      }
    }
  }

  /// What reads a file and would write to it.
  private static let circles = [
    "image export DIR/a.img -o DIR/a.img", "image export DIR/b.img -o DIR/a.img",
    "image export DIR/b.img -o DIR/b.img", "image export DIR/a.img -o DIR/./a.img",
    "image export DIR/a.img -o DIR/hard.img", "image export DIR/a.img -o DIR/soft.img",
    "image merge DIR/b.img -o DIR/a.img", "image merge DIR/b.img -o DIR/b.img",
    "image merge DIR/soft.img -o DIR/a.img", "image merge DIR/a.img -o DIR/hard.img",
    "image create --from-raw DIR/a -o DIR/a", "image create --from-raw DIR/a -o DIR/../NAME/a",
    "image create --from-raw DIR/b --parent DIR/a.img -o DIR/a.img",
    "image create --from-raw DIR/b --parent DIR/b.img -o DIR/a.img",
    "image create --from-raw DIR/b --parent DIR/b.img -o DIR/b",
    "image create --from-firecracker DIR/a --diff DIR/b -o DIR/a",
    "image create --from-firecracker DIR/a --diff DIR/b -o DIR/b",
  ]

  @Test("An output that is read is refused, and nothing is written", arguments: circles)
  func circle(verb: String) throws {
    try withTemporaryDirectory { directory in
      try makeChain(directory)
      try FileManager.default.linkItem(
        atPath: "\(directory)/a.img", toPath: "\(directory)/hard.img")
      try FileManager.default.createSymbolicLink(
        atPath: "\(directory)/soft.img", withDestinationPath: "a.img")
      func files() throws -> [String: Data] {
        var files: [String: Data] = [:]
        for name in try FileManager.default.contentsOfDirectory(atPath: directory) {
          files[name] = try Data(contentsOf: URL(fileURLWithPath: "\(directory)/\(name)"))
        }
        return files
      }
      let before = try files()
      let name = URL(fileURLWithPath: directory).lastPathComponent
      let arguments = verb.replacing("DIR", with: directory).replacing("NAME", with: name)
        .split(separator: " ").map(String.init)
      try faultline(arguments).expectFailure(1, saying: ["choose another name"])
      #expect(try files() == before)
    }
  }
}
