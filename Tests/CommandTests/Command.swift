// SPDX-License-Identifier: Apache-2.0

import Foundation
import Synchronization
import TestSupport
import Testing

/// How a process ended.
enum Ending: Equatable, Sendable {
  case exit(Int32)
  case signal(Int32)
  case timeout
}

/// What a command left behind.
struct Outcome: Sendable {
  let ending: Ending
  let output: String
  let errors: String

  /// The lines of standard output.
  var lines: [Substring] { output.split(separator: "\n") }

  /// Standard output, which has to be one line with one JSON object.
  func json<Value: Decodable>(
    _ type: Value.Type = Value.self, sourceLocation: SourceLocation = #_sourceLocation
  ) throws -> Value {
    #expect(output.hasSuffix("}\n"), "\(self)", sourceLocation: sourceLocation)
    #expect(lines.count == 1, "\(self)", sourceLocation: sourceLocation)
    return try JSONDecoder().decode(type, from: Data(output.utf8))
  }

  /// Standard output as one object in each line.
  func jsonLines<Value: Decodable>(_ type: Value.Type = Value.self) throws -> [Value] {
    try lines.map { try JSONDecoder().decode(type, from: Data($0.utf8)) }
  }

  /// Expects a failure that says why: this exit status, nothing on standard output, and a
  /// message on standard error with these words.
  func expectFailure(
    _ status: Int32, saying words: [String], sourceLocation: SourceLocation = #_sourceLocation
  ) {
    #expect(ending == .exit(status), "\(self)", sourceLocation: sourceLocation)
    #expect(output.isEmpty, sourceLocation: sourceLocation)
    #expect(errors.hasPrefix("Error: "), sourceLocation: sourceLocation)
    for word in words {
      #expect(errors.contains(word), sourceLocation: sourceLocation)
    }
  }
}

/// A process of the command `faultline`, or of something that runs it.
///
/// Its output goes to files, so that nobody has to read while it runs; it is killed when
/// it takes too long, and when nobody waited for it.
final class Command: Sendable {
  /// The executable under test.
  static let executable = builtProduct("faultline").path

  private enum Stream: String, CaseIterable { case output, errors }

  private let process: Process
  private let directory: URL
  private let ended = DispatchSemaphore(value: 0)

  /// Starts it.
  init(
    of path: String = executable, _ arguments: [String], environment: [String: String] = [:]
  ) throws {
    directory = FileManager.default.temporaryDirectory.appendingPathComponent(
      "faultline-command-\(UUID().uuidString)")
    try FileManager.default.createDirectory(at: directory, withIntermediateDirectories: false)
    process = Process()
    process.executableURL = URL(fileURLWithPath: path)
    process.arguments = arguments
    process.environment = ProcessInfo.processInfo.environment.merging(environment) { $1 }
    process.standardInput = FileHandle.nullDevice
    var handles: [FileHandle] = []
    for stream in Stream.allCases {
      let file = directory.appendingPathComponent(stream.rawValue)
      _ = FileManager.default.createFile(atPath: file.path, contents: nil)
      let handle = try FileHandle(forWritingTo: file)
      handles.append(handle)
      switch stream {
      case .output: process.standardOutput = handle
      case .errors: process.standardError = handle
      }
    }
    process.terminationHandler = { [ended] _ in ended.signal() }
    try launch(process)
    // Foundation keeps them for as long as this process runs.
    for handle in handles { try handle.close() }
  }

  deinit {
    if process.isRunning { kill(process.processIdentifier, SIGKILL) }
    try? FileManager.default.removeItem(at: directory)
  }

  var identifier: Int32 { process.processIdentifier }
  var isRunning: Bool { process.isRunning }

  /// What it has written to standard error so far.
  var errorsSoFar: String { (try? text(.errors)) ?? "" }

  func send(_ signal: Int32) { kill(identifier, signal) }

  /// Waits for the end. Whatever was run, and however it ended: no escape sequence where
  /// there is no terminal, and no trap of the Swift runtime.
  func wait(
    seconds: Int = 60, sourceLocation: SourceLocation = #_sourceLocation
  ) throws -> Outcome {
    var ending: Ending?
    if ended.wait(timeout: .now() + .seconds(seconds)) == .timedOut {
      kill(identifier, SIGKILL)
      ended.wait()
      ending = .timeout
    }
    let ended: Ending =
      process.terminationReason == .exit
      ? .exit(process.terminationStatus) : .signal(process.terminationStatus)
    let outcome = Outcome(
      ending: ending ?? ended, output: try text(.output), errors: try text(.errors))
    for text in [outcome.output, outcome.errors] {
      let isPlain = !text.unicodeScalars.contains { ["\r", "\u{1b}", "\u{8}"].contains($0) }
      #expect(isPlain, "\(outcome)", sourceLocation: sourceLocation)
    }
    for trap in ["Fatal error", "Crash", "Backtrace", "Illegal instruction"] {
      #expect(!outcome.errors.contains(trap), sourceLocation: sourceLocation)
    }
    return outcome
  }

  private func text(_ stream: Stream) throws -> String {
    let file = directory.appendingPathComponent(stream.rawValue)
    return String(decoding: try Data(contentsOf: file), as: UTF8.self)
  }
}

/// Runs `faultline` to its end.
func faultline(
  _ arguments: String..., sourceLocation: SourceLocation = #_sourceLocation
) throws -> Outcome {
  try Command(arguments).wait(sourceLocation: sourceLocation)
}

/// The same from an array.
func faultline(
  _ arguments: [String], sourceLocation: SourceLocation = #_sourceLocation
) throws -> Outcome {
  try Command(arguments).wait(sourceLocation: sourceLocation)
}
