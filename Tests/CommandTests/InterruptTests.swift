// SPDX-License-Identifier: Apache-2.0

import Foundation
import TestSupport
import Testing

@Suite("Commands that are ended from outside")
struct InterruptTests {
  @Test(
    "A snapshot that is killed while it writes leaves no file", arguments: [SIGINT, SIGKILL],
    Surroundings.guests)
  func snapshot(_ signal: Int32, _ guest: String) throws {
    try untilInTime {
      try withTemporaryDirectory { directory in
        let ending = try interruptSnapshot(in: directory, signal, guest)
        guard ending != .exit(0) else { return false }
        #expect(ending == .signal(signal))
        #expect(try names(in: directory).isEmpty)
        return true
      }
    }
  }

  @Test(
    "A snapshot that is killed while it writes leaves the image that was there",
    arguments: [SIGINT, SIGKILL])
  func replacement(_ signal: Int32) throws {
    try untilInTime {
      try withImage(mebibytes: 2) { image in
        let ending = try interruptSnapshot(in: image.directory, signal, "process")
        guard ending != .exit(0) else { return false }
        #expect(ending == .signal(signal))
        #expect(try names(in: image.directory) == ["guest.img"])
        #expect(try image.restore().lines.last == "guest verified: 256 pages, 0 wrong")
        return true
      }
    }
  }

  /// Takes a snapshot that gets a signal when its file is open.
  private func interruptSnapshot(
    in directory: String, _ signal: Int32, _ guest: String
  ) throws -> Ending {
    let command = try Command(
      of: "/usr/bin/env",
      [
        "--default-signal=INT", Command.executable, "snapshot", "-o", "\(directory)/guest.img",
        "--memory", "128M", "--guest", guest,
      ])
    let isWriting = Delay.until(seconds: 60) {
      writesUnnamedFile(command.identifier, below: directory) || !command.isRunning
    }
    #expect(isWriting)
    command.send(signal)
    return try command.wait().ending
  }

  @Test("An image that is being made and is killed leaves no file", arguments: [SIGINT, SIGKILL])
  func create(_ signal: Int32) throws {
    try untilInTime {
      try withTemporaryDirectory { directory in
        let raw = "\(directory)/raw"
        try makeRaw(raw, pages: 4096, data: 0..<4096)
        let command = try Command(
          of: "/usr/bin/env",
          [
            "--default-signal=INT", Command.executable, "image", "create", "--from-raw", raw,
            "--level", "19", "-o", "\(directory)/image",
          ])
        let isWriting = Delay.until(seconds: 60) {
          writesUnnamedFile(command.identifier, below: directory) || !command.isRunning
        }
        #expect(isWriting)
        command.send(signal)
        let ending = try command.wait().ending
        guard ending != .exit(0) else { return false }
        #expect(ending == .signal(signal))
        #expect(try names(in: directory) == ["raw"])
        return true
      }
    }
  }

  /// Tries again when the command ended, successfully, before the signal came: on a busy
  /// machine that happens.
  private func untilInTime(_ body: () throws -> Bool) throws {
    for _ in 0..<5 where try body() { return }
    Issue.record("it always ended well: the signal does nothing, or comes too late")
  }

  @Test("A restore that is interrupted ends at once")
  func restore() throws {
    try withImage(mebibytes: 32) { image in
      try untilInTime {
        let command = try Command(
          of: "/usr/bin/env",
          ["--default-signal=INT", Command.executable, "restore", image.path, "--order", "random"])
        let isServing = Delay.until(seconds: 60) {
          threads(of: command.identifier) >= 3 || !command.isRunning
        }
        #expect(isServing)
        command.send(SIGINT)
        let ending = try command.wait(seconds: 60).ending
        guard ending != .exit(0) else { return false }
        #expect(ending == .signal(SIGINT))
        return true
      }
    }
  }

  /// What the demo does when it is interrupted.
  enum Moment: Sendable { case saving, lazyRestore, eagerRestore }

  @Test(
    "A demo that is interrupted leaves an empty directory and no process",
    arguments: [
      (SIGINT, Moment.saving), (SIGINT, .lazyRestore), (SIGINT, .eagerRestore),
      (SIGTERM, .lazyRestore), (SIGHUP, .saving),
    ])
  func demo(_ signal: Int32, _ moment: Moment) throws {
    try untilInTime {
      try withTemporaryDirectory { directory in
        let command = try startDemo(in: directory, until: moment)
        command.send(signal)
        let outcome = try command.wait(seconds: 60)
        guard outcome.ending != .exit(0) else { return false }
        #expect(outcome.ending == .exit(128 + signal), "\(outcome)")
        #expect(outcome.errors.isEmpty)
        #expect(try names(in: directory).isEmpty)
        #expect(processes(naming: directory).isEmpty)
        return true
      }
    }
  }

  @Test("A demo that is killed leaves no process that holds its guest")
  func killedDemo() throws {
    try withTemporaryDirectory { directory in
      let command = try startDemo(in: directory, until: .saving)
      command.send(SIGKILL)
      #expect(try command.wait().ending == .signal(SIGKILL))
      #expect(Delay.until(seconds: 60) { processes(naming: directory).isEmpty })
    }
  }

  private func startDemo(in directory: String, until moment: Moment) throws -> Command {
    let command = try Command(
      of: "/usr/bin/env",
      [
        "--default-signal=INT,TERM,HUP", Command.executable, "demo", "--directory", directory,
        "--memory", "64M", "--guest", "process",
      ])
    let hasCome = Delay.until(seconds: 60) {
      guard command.isRunning else { return true }
      Delay.microseconds(4000)
      return processes(naming: directory, except: command.identifier).contains { line in
        switch moment {
        case .saving: line.contains(" snapshot ")
        case .lazyRestore: line.contains(" restore ")
        case .eagerRestore: line.contains(" eager ")
        }
      }
    }
    #expect(hasCome)
    return command
  }

  private func threads(of process: Int32) -> Int {
    (try? FileManager.default.contentsOfDirectory(atPath: "/proc/\(process)/task").count) ?? 0
  }
}
