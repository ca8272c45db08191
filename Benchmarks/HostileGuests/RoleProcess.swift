// SPDX-License-Identifier: Apache-2.0

import CHostileVMM
import Foundation

/// Plays a role in this process, for the hidden command that `RoleProcess` starts; the exit status.
public func playHostileRole(_ words: [String]) -> Int32 {
  var pointers: [UnsafeMutablePointer<CChar>?] = unsafe words.map { unsafe strdup($0) }
  defer { unsafe pointers.forEach { unsafe free($0) } }
  return unsafe pointers.withUnsafeMutableBufferPointer { buffer in
    // SAFETY: as many words as are said, each a string of C.
    unsafe hostile_main(CInt(buffer.count), buffer.baseAddress)
  }
}

/// What a guest counted.
public struct GuestReport: Sendable {
  /// Its exit status: 0, 2 a page was wrong, 3 it was refused, 77 this machine cannot do it; a
  /// signal's negated.
  public let status: Int32
  /// What it said on standard error.
  public let words: String
  private let counts: [String: Double]

  init(status: Int32, output: String, words: String) {
    self.status = status
    self.words = words
    var counts: [String: Double] = [:]
    for word in output.split(whereSeparator: \.isWhitespace) {
      let parts = word.split(separator: "=")
      if parts.count == 2, let value = Double(parts[1]) { counts[String(parts[0])] = value }
    }
    self.counts = counts
  }

  /// A number that it said; -1 where it did not.
  public subscript(_ name: String) -> Double { counts[name] ?? -1 }

  /// Whether the service refused its hand-over.
  public var wasRefused: Bool { status == 3 }
  /// Whether this machine does not have what it needs.
  public var cannotBeDone: Bool { status == 77 }
}

/// A guest in a process of its own: this command with its hidden word.
final class RoleProcess: Sendable {
  private let process = Process()
  private let directory: String

  /// - Parameter command: `faultline`.
  init(_ command: URL, in directory: String, _ role: String, _ words: [String]) throws {
    self.directory = directory + "/\(role)-\(UUID())"
    try FileManager.default.createDirectory(
      atPath: self.directory, withIntermediateDirectories: false)
    process.executableURL = command
    process.arguments = ["hostile-role", "role=\(role)"] + words
    process.standardInput = FileHandle.nullDevice
    process.standardOutput = try Self.file(self.directory + "/output")
    process.standardError = try Self.file(self.directory + "/words")
    try start(process)
  }

  deinit { kill() }

  private static func file(_ path: String) throws -> FileHandle {
    _ = FileManager.default.createFile(atPath: path, contents: nil)
    return try FileHandle(forWritingTo: URL(fileURLWithPath: path))
  }

  var identifier: Int32 { process.processIdentifier }

  func kill() {
    if process.isRunning { Foundation.kill(process.processIdentifier, SIGKILL) }
    process.waitUntilExit()
  }

  /// Waits for its end, and kills it where that takes longer than it should.
  func report(within seconds: Double) -> GuestReport {
    if !waits(seconds: seconds, { !process.isRunning }) { kill() }
    process.waitUntilExit()
    let status = process.terminationStatus
    return GuestReport(
      status: process.terminationReason == .exit ? status : -status, output: text("output"),
      words: text("words"))
  }

  private func text(_ name: String) -> String {
    (try? String(contentsOfFile: directory + "/" + name, encoding: .utf8)) ?? ""
  }
}

/// Starts a process. One at a time, and without the backtracer of one that crashes: the socket by
/// which Foundation learns of an end would stay open in them.
func start(_ process: Process) throws {
  process.environment = ProcessInfo.processInfo.environment
    .merging(["SWIFT_BACKTRACE": "enable=no"]) { $1 }
  starting.lock()
  defer { starting.unlock() }
  try process.run()
}

private let starting = NSLock()

/// Waits until something holds; `false` when it does not within the time.
func waits(seconds: Double, _ condition: () -> Bool) -> Bool {
  let end = ContinuousClock.now + .seconds(seconds)
  while ContinuousClock.now < end {
    if condition() { return true }
    usleep(2000)
  }
  return condition()
}
