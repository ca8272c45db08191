// SPDX-License-Identifier: Apache-2.0

import Foundation
import LinuxSystem
import MemoryImage
import MemoryImport
import SystemPackage
import TestSupport
import Testing

/// Repeatable random numbers (SplitMix64).
struct Random: RandomNumberGenerator {
  private var state: UInt64

  init(seed: UInt64) { state = seed }

  mutating func next() -> UInt64 {
    state &+= 0x9E37_79B9_7F4A_7C15
    var word = state
    word = (word ^ (word >> 30)) &* 0xBF58_476D_1CE4_E5B9
    word = (word ^ (word >> 27)) &* 0x94D0_49BB_1331_11EB
    return word ^ (word >> 31)
  }

  /// Bytes, none of them zero, from a pool that was made once: tests want megabytes.
  mutating func bytes(_ count: Int) -> [UInt8] {
    var bytes: [UInt8] = []
    while bytes.count < count {
      let start = Int.random(in: 0..<Self.pool.count, using: &self)
      bytes += Self.pool[start..<min(Self.pool.count, start + count - bytes.count)]
    }
    return bytes
  }

  private static let pool = {
    var random = Random(seed: 0)
    return (0..<100_003).map { _ in UInt8(truncatingIfNeeded: random.next()) | 1 }
  }()
}

/// The error that a body throws; a test fails when there is none.
func importError(_ body: () throws -> Void) -> ImportError? {
  do {
    try body()
    Issue.record("nothing was thrown")
    return nil
  } catch let error as ImportError {
    return error
  } catch {
    Issue.record(error)
    return nil
  }
}

// MARK: - Files

/// What a file has, besides holes.
struct Part: Sendable {
  let offset: Int
  let bytes: [UInt8]
}

/// Makes a file with holes where there are no parts.
func makeFile(_ path: FilePath, length: Int, _ parts: [Part] = []) throws {
  _ = FileManager.default.createFile(atPath: path.string, contents: nil)
  let handle = try #require(FileHandle(forWritingAtPath: path.string))
  try handle.truncate(atOffset: UInt64(length))
  for part in parts {
    try handle.seek(toOffset: UInt64(part.offset))
    try handle.write(contentsOf: Data(part.bytes))
  }
  try handle.close()
}

func makeFile(_ path: FilePath, _ bytes: [UInt8]) throws {
  try makeFile(path, length: bytes.count, [Part(offset: 0, bytes: bytes)])
}

/// Parts of whole pages at random, some of them next to each other, some of one page.
func randomParts(pages: Int, _ random: inout Random) -> [Part] {
  var parts: [Part] = []
  var page = Int.random(in: 0...3, using: &random)
  while page < pages {
    let count = min(Int.random(in: 1...5, using: &random), pages - page)
    parts.append(Part(offset: page * 4096, bytes: random.bytes(count * 4096)))
    page += count + Int.random(in: 0...7, using: &random)
  }
  return parts
}

func contents(of path: FilePath) throws -> [UInt8] {
  Array(try Data(contentsOf: URL(fileURLWithPath: path.string)))
}

/// Bytes of a file that have storage.
func allocatedBytes(of path: FilePath) throws -> Int {
  try OwnedDescriptor(openingForReading: path).status.allocatedBytes
}

func names(in directory: String) throws -> [String] {
  try FileManager.default.contentsOfDirectory(atPath: directory).sorted()
}

func withDirectory(_ body: (FilePath) throws -> Void) throws {
  try withTemporaryDirectory { try body(FilePath($0)) }
}

// MARK: - Reading

extension MemoryInput {
  /// Bytes of a region, read at once into a buffer that was not zero.
  func bytes(region: Int, offset: Int, count: Int) throws -> (bytes: [UInt8], hasData: Bool) {
    var bytes = [UInt8](repeating: 0xa5, count: count)
    let hasData = try unsafe bytes.withUnsafeMutableBytes {
      try unsafe read(region: region, offset: offset, into: $0)
    }
    return (bytes, hasData)
  }

  func bytes(region: Int) throws -> [UInt8] {
    try bytes(region: region, offset: 0, count: regions[region].length).bytes
  }

  /// All extents of a region.
  func extents(region: Int) throws -> [InputExtent] {
    var extents: [InputExtent] = []
    while let next = try nextExtent(
      region: region, from: extents.last.map { $0.offset + $0.length } ?? 0)
    {
      extents.append(next)
    }
    return extents
  }
}

// MARK: - Programs

/// Where a program is, if it is installed.
func program(_ name: String) -> String? {
  ["/usr/bin/", "/usr/local/bin/", "/bin/"].map { $0 + name }.first {
    FileManager.default.isExecutableFile(atPath: $0)
  }
}

/// Runs a program to its end, with a text as its input; killed after a minute.
func run(_ path: String, _ arguments: [String], input: String = "") throws -> Int32 {
  let process = Process()
  process.executableURL = URL(fileURLWithPath: path)
  process.arguments = arguments
  let pipe = Pipe()
  process.standardInput = pipe
  process.standardOutput = FileHandle.nullDevice
  process.standardError = FileHandle.nullDevice
  try launch(process)
  try? pipe.fileHandleForWriting.write(contentsOf: Data(input.utf8))
  try? pipe.fileHandleForWriting.close()
  let deadline = Date(timeIntervalSinceNow: 60)
  while process.isRunning, Date() < deadline { usleep(10_000) }
  if process.isRunning { kill(process.processIdentifier, SIGKILL) }
  process.waitUntilExit()
  return process.terminationStatus
}
