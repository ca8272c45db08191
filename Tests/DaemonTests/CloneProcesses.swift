// SPDX-License-Identifier: Apache-2.0

import Foundation
import TestSupport
import Testing

/// A clone in a process of its own; see Tests/CloneProcess.
final class CloneProcess: Sendable {
  private let process: Process
  private let input = Pipe()
  private let output = Pipe()

  init(_ socket: String, image: String = "", pageSize: Int = 4096) throws {
    process = Process()
    process.executableURL = builtProduct("clone-process")
    process.arguments = [socket, image, "\(pageSize)"]
    process.standardInput = input
    process.standardOutput = output
    process.standardError = FileHandle.nullDevice
    try launch(process)
    let line = try self.line()
    try #require(line == "attached", "\(line)")
  }

  deinit { kill() }

  /// The next line that it says; empty at its end.
  private func line() throws -> String {
    var bytes = Data()
    while let byte = try output.fileHandleForReading.read(upToCount: 1), byte != Data("\n".utf8) {
      bytes += byte
    }
    return String(decoding: bytes, as: UTF8.self)
  }

  /// Has it do something, and returns what it says to that.
  func ask(_ command: String) throws -> String {
    try start(command)
    return try line()
  }

  /// Has it do something, and does not wait.
  func start(_ command: String) throws {
    try input.fileHandleForWriting.write(contentsOf: Data((command + "\n").utf8))
  }

  func kill() {
    if process.isRunning { _ = Foundation.kill(process.processIdentifier, SIGKILL) }
    process.waitUntilExit()
  }

  /// Lets it end by itself.
  func finish() throws {
    try input.fileHandleForWriting.close()
    process.waitUntilExit()
  }
}

extension Service {
  /// A sample of the metrics; -1 where there is none.
  func metric(_ name: String) throws -> Int {
    let text = try request("GET", "/metrics")
    guard let line = text.split(separator: "\n").first(where: { $0.hasPrefix(name + " ") }) else {
      return -1
    }
    return Int(line.dropFirst(name.count + 1).filter(\.isNumber)) ?? -1
  }

  /// Waits until no session is left and what went with them is closed.
  func isEmpty(descriptors: Int) -> Bool {
    Delay.until {
      (try? sessions().isEmpty) == true && daemon.descriptorCount <= descriptors
    }
  }
}
