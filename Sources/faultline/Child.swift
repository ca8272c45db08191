// SPDX-License-Identifier: Apache-2.0

import Foundation
import Synchronization

/// Runs this command again as a process of its own.
enum Child {
  /// What `snapshot --json` says.
  struct Saved: Decodable {
    let fillNanoseconds: UInt64
    let snapshotNanoseconds: UInt64
  }

  /// Runs `snapshot … --json --hold`, and kills it when it has saved its guest.
  static func snapshot(_ arguments: [String]) throws -> Saved {
    let (process, output) = try start(arguments)
    let line = firstLine(of: output)
    kill(process.processIdentifier, SIGKILL)
    process.waitUntilExit()
    running.withLock { $0.removeAll { $0 === process } }
    guard let saved = try? JSONDecoder().decode(Saved.self, from: line) else {
      throw CommandFailure("the process that makes the snapshot failed; its message is above")
    }
    return saved
  }

  /// Runs `restore … --json` to its end.
  static func restore(_ arguments: [String]) throws -> RestoreReport {
    let (process, output) = try start(arguments)
    let data = output.fileHandleForReading.readDataToEndOfFile()
    process.waitUntilExit()
    running.withLock { $0.removeAll { $0 === process } }
    guard let report = try? JSONDecoder().decode(RestoreReport.self, from: data) else {
      throw CommandFailure("the process that restores failed; its message is above")
    }
    return report
  }

  /// Kills the children that still run, waits until they are gone, and ends this process:
  /// they are in process groups of their own, so ^C does not reach them.
  ///
  /// The lock is kept to the end: nobody starts another child, or tells of one that was
  /// killed as if it had failed.
  static func endAll(_ end: () -> Never) -> Never {
    running.withLock { processes in
      for process in processes where process.isRunning {
        kill(process.processIdentifier, SIGKILL)
      }
      // A dying child may still give its image the name, in a directory that `end` removes.
      while processes.contains(where: \.isRunning) { usleep(1000) }
      end()
    }
  }

  private static let running = Mutex<[Process]>([])

  private static func start(_ arguments: [String]) throws -> (Process, Pipe) {
    let process = Process()
    process.executableURL = URL(fileURLWithPath: "/proc/self/exe").resolvingSymlinksInPath()
    process.arguments = arguments
    let output = Pipe()
    process.standardOutput = output
    try running.withLock {
      try process.run()
      $0.append(process)
    }
    return (process, output)
  }

  private static func firstLine(of pipe: Pipe) -> Data {
    var line = Data()
    while true {
      let part = pipe.fileHandleForReading.availableData
      if part.isEmpty { return line }
      line.append(part)
      if let end = line.firstIndex(of: 0x0a) { return line[..<end] }
    }
  }
}

/// Removes a directory at the end, also when ^C, SIGTERM or a closed terminal ends the command.
final class InterruptCleanup: @unchecked Sendable {
  // SAFETY: `sources` is written by `init` only; it keeps the handlers alive.
  private let folder: URL
  private var sources: [any DispatchSourceSignal] = []

  init(_ folder: URL) {
    self.folder = folder
    for number in [SIGINT, SIGTERM, SIGHUP] {
      signal(number, SIG_IGN)
      let source = DispatchSource.makeSignalSource(signal: number, queue: .global())
      source.setEventHandler {
        Child.endAll {
          self.run()
          _exit(128 + number)
        }
      }
      source.resume()
      sources.append(source)
    }
  }

  func run() { try? FileManager.default.removeItem(at: folder) }
}
