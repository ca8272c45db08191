// SPDX-License-Identifier: Apache-2.0

import Foundation
import LinuxSystem
import Synchronization

/// `faultline serve` in a process of its own, and what it takes of the machine.
final class ObservedService: Sendable {
  /// What it has at a moment.
  struct Usage: Sendable {
    /// Memory of its own (RssAnon, proc(5)).
    var anonymousKiB = 0
    var descriptors = 0
    var threads = 0

    mutating func formMaximum(_ other: Usage) {
      anonymousKiB = max(anonymousKiB, other.anonymousKiB)
      descriptors = max(descriptors, other.descriptors)
      threads = max(threads, other.threads)
    }
  }

  let directory: String
  private let process = Process()
  private let peak = Mutex(Usage())
  private let isObserved = Atomic<Bool>(false)

  var firecrackerSocket: String { directory + "/firecracker.sock" }
  var handoverSocket: String { directory + "/handover.sock" }
  var controlSocket: String { directory + "/control.sock" }
  private var log: String { directory + "/log" }

  /// Starts it, and waits until it is ready.
  ///
  /// - Parameters:
  ///   - launcher: words of a command that becomes the service.
  ///   - settings: lines of the configuration file.
  init(_ command: URL, in directory: String, launcher: [String] = [], settings: [String] = [])
    throws
  {
    self.directory = directory
    let image = directory + "/base.img"
    if !FileManager.default.fileExists(atPath: image) { try HostileImage.write(to: image) }
    let configuration = """
      listen:
        - socket: \(directory)/firecracker.sock
          image: \(image)
        - socket: \(directory)/handover.sock
          handover: faultline
          image: \(image)
      control-socket: \(directory)/control.sock

      """
    let file = directory + "/config.yaml"
    try (configuration + settings.joined(separator: "\n")).write(
      toFile: file, atomically: true, encoding: .utf8)
    _ = FileManager.default.createFile(atPath: directory + "/log", contents: nil)
    let words = launcher + [command.path, "serve", "--config", file]
    process.executableURL = URL(fileURLWithPath: words[0])
    process.arguments = Array(words.dropFirst())
    process.standardInput = FileHandle.nullDevice
    process.standardOutput = FileHandle.nullDevice
    process.standardError = try FileHandle(
      forWritingTo: URL(fileURLWithPath: directory + "/log"))
    try start(process)
    guard waits(seconds: 60, { messages.contains("ready") || !process.isRunning }), isRunning else {
      throw HostileFailure("the service does not start: \(messages)")
    }
  }

  deinit { kill() }

  var isRunning: Bool { process.isRunning }
  var identifier: Int32 { process.processIdentifier }
  /// Its log.
  var messages: String { (try? String(contentsOfFile: log, encoding: .utf8)) ?? "" }

  func kill() {
    if process.isRunning { Foundation.kill(process.processIdentifier, SIGKILL) }
    process.waitUntilExit()
  }

  /// Asks it to end (SIGTERM); its exit status, a signal's negated, or `nil` when it does not.
  func end(within seconds: Double) -> Int32? {
    if process.isRunning { Foundation.kill(process.processIdentifier, SIGTERM) }
    guard waits(seconds: seconds, { !process.isRunning }) else { return nil }
    process.waitUntilExit()
    return process.terminationReason == .exit
      ? process.terminationStatus : -process.terminationStatus
  }

  // MARK: - What it takes

  /// What it has now.
  var usage: Usage {
    let status = processText("status")
    func number(_ name: String) -> Int {
      let line = status.split(separator: "\n").first { $0.hasPrefix(name) }
      return line.flatMap { Int($0.filter(\.isNumber)) } ?? 0
    }
    return Usage(
      anonymousKiB: number("RssAnon:"), descriptors: openFiles.count, threads: number("Threads:"))
  }

  /// What its descriptors are, but for the timers that libdispatch opens when it first needs them.
  var openFiles: [String] {
    let directory = "/proc/\(identifier)/fd"
    let numbers = (try? FileManager.default.contentsOfDirectory(atPath: directory)) ?? []
    return numbers.compactMap { number in
      try? FileManager.default.destinationOfSymbolicLink(atPath: "\(directory)/\(number)")
    }.filter { $0 != "anon_inode:[timerfd]" }
  }

  /// Seconds of a processor so far.
  var processorTime: Double {
    // After the name in brackets: state is the first, utime and stime the 12th and 13th.
    let fields = processText("stat").split(separator: ")").last?.split(separator: " ") ?? []
    guard fields.count > 13 else { return 0 }
    return (Double(fields[11]) ?? 0) / 100 + (Double(fields[12]) ?? 0) / 100
  }

  private func processText(_ name: String) -> String {
    let path = URL(fileURLWithPath: "/proc/\(identifier)/\(name)")
    guard let bytes = try? FileHandle(forReadingFrom: path).readToEnd() else { return "" }
    return String(decoding: bytes, as: UTF8.self)
  }

  /// Runs a body, and returns the most that it had meanwhile.
  func observed<Value>(_ body: () throws -> Value) throws -> (value: Value, peak: Usage) {
    peak.withLock { $0 = Usage() }
    isObserved.store(true, ordering: .releasing)
    let observer = try NamedThread(name: "observer") {
      while self.isObserved.load(ordering: .acquiring) {
        let usage = self.usage
        self.peak.withLock { $0.formMaximum(usage) }
        usleep(20_000)
      }
    }
    defer { isObserved.store(false, ordering: .releasing) }
    let value = try body()
    isObserved.store(false, ordering: .releasing)
    observer.join()
    return (value, peak.withLock { $0 })
  }
}

/// Why a round of hostile guests could not be held.
public struct HostileFailure: Error, CustomStringConvertible {
  /// The reason, in words.
  public let description: String
  init(_ description: String) { self.description = description }
}
