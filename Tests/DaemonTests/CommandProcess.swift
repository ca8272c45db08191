// SPDX-License-Identifier: Apache-2.0

import Foundation
import TestSupport

/// A command of `faultline` in a process of its own. Its output goes to files, so that nobody has
/// to read while it runs.
final class CommandProcess: Sendable {
  private let process: Process
  private let directory: String

  init(_ arguments: [String]) throws {
    directory =
      FileManager.default.temporaryDirectory.appendingPathComponent(
        "faultline-\(UUID().uuidString)"
      ).path
    try FileManager.default.createDirectory(
      atPath: directory, withIntermediateDirectories: false)
    process = Process()
    process.executableURL = builtProduct("faultline")
    process.arguments = arguments
    process.standardInput = FileHandle.nullDevice
    process.standardOutput = try Self.file(directory + "/output")
    process.standardError = try Self.file(directory + "/errors")
    try launch(process)
  }

  deinit {
    if process.isRunning { kill(process.processIdentifier, SIGKILL) }
    process.waitUntilExit()
    try? FileManager.default.removeItem(atPath: directory)
  }

  private static func file(_ path: String) throws -> FileHandle {
    _ = FileManager.default.createFile(atPath: path, contents: nil)
    return try FileHandle(forWritingTo: URL(fileURLWithPath: path))
  }

  func send(_ signal: Int32) { kill(process.processIdentifier, signal) }

  /// What it has written to standard error so far.
  var errors: String { text("errors") }

  /// Waits for its end; its exit status (a signal's negated), standard output and error.
  func wait() -> (status: Int32, output: String, errors: String) {
    if !Delay.until({ !process.isRunning }) { send(SIGKILL) }
    process.waitUntilExit()
    let status = process.terminationStatus
    return (
      process.terminationReason == .exit ? status : -status, text("output"), text("errors")
    )
  }

  private func text(_ name: String) -> String {
    (try? String(contentsOfFile: directory + "/" + name, encoding: .utf8)) ?? ""
  }
}

/// What a command of `faultline` says; its exit status, standard output and error.
func faultline(_ arguments: String...) throws -> (status: Int32, output: String, errors: String) {
  try CommandProcess(arguments).wait()
}
