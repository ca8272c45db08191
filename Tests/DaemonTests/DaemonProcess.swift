// SPDX-License-Identifier: Apache-2.0

import FaultlineDaemon
import Foundation
import LinuxSystem
import SystemPackage
import TestSupport
import Testing
import Userfault

/// `faultline serve`, in a process of its own.
final class DaemonProcess: Sendable {
  let directory: String
  private let process: Process
  private let log: String

  /// Starts it and waits until it is ready.
  ///
  /// - Parameters:
  ///   - launcher: a command that becomes the daemon; the daemon's words follow it.
  ///   - input: its standard input, for a launcher that does something with it.
  ///   - waits: until it says in its log that it is ready.
  init(
    in directory: String, _ arguments: [String], environment: [String: String] = [:],
    launcher: [String] = [], input: FileHandle = .nullDevice, waits: Bool = true
  ) throws {
    self.directory = directory
    log = directory + "/log-\(UUID().uuidString)"
    _ = FileManager.default.createFile(atPath: log, contents: nil)
    process = Process()
    let words = launcher + [builtProduct("faultline").path, "serve"] + arguments
    process.executableURL = URL(fileURLWithPath: words[0])
    process.arguments = Array(words.dropFirst())
    process.environment = ProcessInfo.processInfo.environment.merging(environment) { $1 }
    process.standardInput = input
    process.standardOutput = FileHandle.nullDevice
    process.standardError = try FileHandle(forWritingTo: URL(fileURLWithPath: log))
    try launch(process)
    guard waits else { return }
    try #require(Delay.until { logged("ready") || !isRunning } && isRunning, "\(messages)")
  }

  deinit {
    if process.isRunning { kill(process.processIdentifier, SIGKILL) }
    process.waitUntilExit()
  }

  var identifier: Int32 { process.processIdentifier }
  var isRunning: Bool { process.isRunning }

  /// What it has written to standard error.
  var messages: String { (try? String(contentsOfFile: log, encoding: .utf8)) ?? "" }
  func logged(_ text: String) -> Bool { messages.contains(text) }

  func send(_ signal: Int32) { kill(identifier, signal) }

  /// Waits for its end; its exit status.
  func wait() -> Int32 {
    _ = Delay.until { !process.isRunning }
    if process.isRunning { kill(process.processIdentifier, SIGKILL) }
    process.waitUntilExit()
    return process.terminationReason == .exit
      ? process.terminationStatus : -process.terminationStatus
  }

  /// Entries of one of its directories in /proc.
  func count(_ name: String) -> Int {
    (try? FileManager.default.contentsOfDirectory(atPath: "/proc/\(identifier)/\(name)").count)
      ?? -1
  }

  /// Processor time that it has used, in hundredths of a second.
  var processorTicks: Int {
    let text = (try? String(contentsOfFile: "/proc/\(identifier)/stat", encoding: .utf8)) ?? ""
    // The name is in parentheses, and may have spaces.
    let fields = text.components(separatedBy: ") ").last?.split(separator: " ") ?? []
    return fields.count > 12 ? (Int(fields[11]) ?? 0) + (Int(fields[12]) ?? 0) : -1
  }

  /// What its descriptors refer to.
  var descriptorNames: [String] {
    let directory = "/proc/\(identifier)/fd"
    let numbers = (try? FileManager.default.contentsOfDirectory(atPath: directory)) ?? []
    return numbers.compactMap {
      try? FileManager.default.destinationOfSymbolicLink(atPath: "\(directory)/\($0)")
    }
  }

  /// Its threads with a name.
  func threads(named name: String) -> Int {
    let directory = "/proc/\(identifier)/task"
    let tasks = (try? FileManager.default.contentsOfDirectory(atPath: directory)) ?? []
    return tasks.count { task in
      (try? String(contentsOfFile: "\(directory)/\(task)/comm", encoding: .utf8)) == name + "\n"
    }
  }

  /// Its descriptors, but for the timers that libdispatch opens when it first needs them.
  var descriptorCount: Int {
    let directory = "/proc/\(identifier)/fd"
    guard let names = try? FileManager.default.contentsOfDirectory(atPath: directory) else {
      return -1
    }
    return names.count {
      (try? FileManager.default.destinationOfSymbolicLink(atPath: "\(directory)/\($0)"))
        != "anon_inode:[timerfd]"
    }
  }

  /// Memory of its own, in KiB (VmRSS without files).
  var anonymousKiB: Int {
    guard
      let text = try? FileHandle(forReadingFrom: URL(fileURLWithPath: "/proc/\(identifier)/status"))
        .readToEnd(),
      let line = String(decoding: text, as: UTF8.self).split(separator: "\n").first(where: {
        $0.hasPrefix("RssAnon:")
      })
    else { return -1 }
    return Int(line.filter(\.isNumber)) ?? -1
  }
}

/// A daemon with one image, two regions of 256 and 768 blocks, and its sockets.
struct Service {
  let daemon: DaemonProcess
  let directory: String
  var socket: String { directory + "/vmm.sock" }
  var control: String { directory + "/control.sock" }

  init(
    in directory: String, handover: String = "firecracker", regions: [Int] = [512, 512],
    image: String? = nil, _ arguments: [String] = [], environment: [String: String] = [:],
    launcher: [String] = [], logsToFile: Bool = true
  ) throws {
    self.directory = directory
    let base = directory + "/base.img"
    if image == nil, !FileManager.default.fileExists(atPath: base) {
      _ = try makePatternImage(base, regions: imageRegions(regions))
    }
    daemon = try DaemonProcess(
      in: directory,
      [
        "--socket", directory + "/vmm.sock", "--handover", handover, "--image",
        image ?? base,
        "--control-socket", directory + "/control.sock", "--log-level", "debug",
      ] + arguments, environment: environment, launcher: launcher, waits: logsToFile)
    guard !logsToFile else { return }
    let answers = Delay.until { (try? sessions()) != nil || !daemon.isRunning }
    try #require(answers && daemon.isRunning)
  }

  /// The sessions, as `ps --json` has them.
  func sessions() throws -> [ControlMessage.Session] {
    let answer = try faultline("ps", "--json", "--control-socket", control)
    let decoder = JSONDecoder()
    decoder.keyDecodingStrategy = .convertFromSnakeCase
    return try decoder.decode(ControlMessage.SessionList.self, from: Data(answer.output.utf8))
      .sessions
  }

  /// Remove events of all sessions, that is, those that were read.
  var removeEvents: Int { (try? metric("faultline_events_total{kind=\"remove\"}")) ?? 0 }

  /// curl, for the paths that no command uses: method, path, body.
  func request(_ method: String, _ path: String, body: String? = nil) throws -> String {
    let socket = try UnixSocket(connectingTo: FilePath(control))
    var text = "\(method) \(path) HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
    if let body { text += "Content-Length: \(body.utf8.count)\r\n" }
    try socket.send(Array((text + "\r\n" + (body ?? "")).utf8))
    var bytes: [UInt8] = []
    while true {
      let piece = try socket.receive(limit: 1 << 16).bytes
      guard !piece.isEmpty else { break }
      bytes += piece
    }
    return String(decoding: bytes, as: UTF8.self)
  }
}

/// A Firecracker in a process of its own; see Tests/FakeFirecracker.
final class FirecrackerProcess: Sendable {
  private let process: Process
  private let input = Pipe()
  private let output = Pipe()

  init(_ socket: String, regions: Int = 2, pages: Int = 512, piece: Int = 1 << 20) throws {
    process = Process()
    process.executableURL = builtProduct("fake-firecracker")
    process.arguments = [socket, "\(regions)", "\(pages)", "4096", "both", "\(piece)"]
    process.standardInput = input
    process.standardOutput = output
    process.standardError = FileHandle.nullDevice
    try launch(process)
  }

  deinit { kill() }

  var identifier: Int32 { process.processIdentifier }

  func kill() {
    if process.isRunning { _ = Foundation.kill(process.processIdentifier, SIGKILL) }
    process.waitUntilExit()
  }

  /// Waits for its end; whether SIGKILL was it.
  func wasKilled() -> Bool {
    process.waitUntilExit()
    return process.terminationReason == .uncaughtSignal && process.terminationStatus == SIGKILL
  }

  /// Lets it end, and returns all that it said.
  func finish() throws -> String {
    try input.fileHandleForWriting.close()
    let text = String(
      decoding: output.fileHandleForReading.readDataToEndOfFile(), as: UTF8.self)
    process.waitUntilExit()
    return text
  }
}
