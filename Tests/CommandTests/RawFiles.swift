// SPDX-License-Identifier: Apache-2.0

import Foundation
import Testing

/// Writes a sparse file of so many pages; those that are named hold their number and a seed.
func makeRaw(_ path: String, pages: Int, data: some Sequence<Int>, seed: Int = 1) throws {
  _ = FileManager.default.createFile(atPath: path, contents: nil)
  let handle = try FileHandle(forWritingTo: URL(fileURLWithPath: path))
  try handle.truncate(atOffset: UInt64(pages) * 4096)
  for page in data {
    try handle.seek(toOffset: UInt64(page) * 4096)
    let words = (0..<512).map { UInt64(page &* 512 + $0) &* 0x9E37_79B9 &+ UInt64(seed) }
    try handle.write(contentsOf: unsafe words.withUnsafeBytes { unsafe Data($0) })
  }
  try handle.close()
}

/// All of a file.
func contents(of path: String) throws -> Data {
  try Data(contentsOf: URL(fileURLWithPath: path))
}

/// Runs `faultline image` with arguments; it has to go well and to say one line.
func makeImage(_ arguments: String...) throws {
  let outcome = try faultline(["image"] + arguments)
  guard outcome.ending == .exit(0), outcome.lines.count == 1 else {
    throw CommandProblem(outcome: outcome)
  }
}

/// A command that had to go well and did not.
struct CommandProblem: Error {
  let outcome: Outcome
}
