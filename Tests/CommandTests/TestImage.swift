// SPDX-License-Identifier: Apache-2.0

import Foundation
import TestSupport
import Testing

/// Makes a snapshot whose blocks are stored as they are in a directory of its own and removes it afterwards.
func withImage<Value>(
  mebibytes: Int = 8, guest: String = "process", _ options: [String] = [],
  _ body: (TestImage) throws -> Value
) throws -> Value {
  try withTemporaryDirectory { directory in
    let path = "\(directory)/guest.img"
    let saved = try faultline(
      ["snapshot", "-o", path, "--memory", "\(mebibytes)M", "--guest", guest, "--level", "0"]
        + options)
    try #require(saved.ending == .exit(0), "\(saved)")
    return try body(TestImage(path: path, mebibytes: mebibytes))
  }
}

/// An image of a test guest, and ways to spoil it.
struct TestImage {
  let path: String
  let mebibytes: Int

  var directory: String { URL(fileURLWithPath: path).deletingLastPathComponent().path }

  /// The guest fills and verifies what is above its first MiB.
  var guestPages: Int { mebibytes * 256 - 256 }

  func restore(_ options: String...) throws -> Outcome {
    try faultline(["restore", path] + options)
  }

  func read(at offset: UInt64, count: Int) throws -> Data {
    let file = try FileHandle(forReadingFrom: URL(fileURLWithPath: path))
    defer { try? file.close() }
    try file.seek(toOffset: offset)
    let data = try #require(try file.read(upToCount: count))
    try #require(data.count == count)
    return data
  }

  func write(_ bytes: Data, at offset: UInt64) throws {
    let file = try FileHandle(forUpdating: URL(fileURLWithPath: path))
    defer { try? file.close() }
    try file.seek(toOffset: offset)
    try file.write(contentsOf: bytes)
  }

  func flip(byteAt offset: UInt64) throws {
    let old = try read(at: offset, count: 1)
    try write(Data(old.map { $0 ^ 0x40 }), at: offset)
  }

  func truncate(to length: UInt64) throws {
    let file = try FileHandle(forUpdating: URL(fileURLWithPath: path))
    defer { try? file.close() }
    try file.truncate(atOffset: length)
  }

  var length: UInt64 {
    get throws { try read(number: 16) }
  }

  private func read(number offset: UInt64) throws -> UInt64 {
    try read(at: offset, count: 8).reversed().reduce(0) { $0 << 8 | UInt64($1) }
  }

  /// Flips a byte in the data of the first block from the given one on that is stored and
  /// that no other block is equal to, and tells which it was (docs/image-format.md).
  func damageBlock(from first: Int) throws -> Int {
    let data = try read(number: 184)
    var uses: [UInt64: Int] = [:]
    let entries = try (0..<mebibytes * 256).map { try entry(of: $0) }
    for entry in entries { uses[entry, default: 0] += 1 }
    for block in first..<mebibytes * 256 where entries[block] != 0 && uses[entries[block]] == 1 {
      try flip(byteAt: data + 4096 * (entries[block] - 1) + 123)
      return block
    }
    throw CocoaError(.fileReadCorruptFile)
  }

  /// Flips a byte in the page index of a block.
  func damageIndex(of block: Int) throws { try flip(byteAt: try place(ofEntry: block)) }

  private func entry(of block: Int) throws -> UInt64 {
    try read(at: try place(ofEntry: block), count: 4).reversed()
      .reduce(0) { $0 << 8 | UInt64($1) }
  }

  private func place(ofEntry block: Int) throws -> UInt64 {
    let index = try read(number: try read(number: 56) + 24)
    return index + 4096 * UInt64(block / 1022) + 4 * UInt64(block % 1022)
  }
}
