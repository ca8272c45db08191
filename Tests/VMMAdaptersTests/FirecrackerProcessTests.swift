// SPDX-License-Identifier: Apache-2.0

import Foundation
import Glibc
import LinuxSystem
import MemoryImage
import Pager
import SystemPackage
import TestSupport
import Testing

@testable import VMMAdapters

/// The executable `fake-firecracker`, and the connection that it made.
private final class FirecrackerProcess: Sendable {
  let process: Process
  let socket: UnixSocket
  private let input = Pipe()
  private let output = Pipe()

  init(
    _ directory: String, regions: Int, pages: Int, pageSize: PageSize = .size4KiB, piece: Int = 50,
    memory: String = "reserved"
  ) throws {
    let path = directory + "/socket"
    let listener = try UnixListener(path: FilePath(path))
    defer { try? FileManager.default.removeItem(atPath: path) }
    let process = Process()
    process.executableURL = builtProduct("fake-firecracker")
    process.arguments = [
      path, "\(regions)", "\(pages)", "\(pageSize.bytes)", "both", "\(piece)", memory,
    ]
    process.standardInput = input
    process.standardOutput = output
    try launch(process)
    socket = try listener.accept()
    self.process = process
  }

  deinit { kill() }

  func kill() {
    if process.isRunning { _ = Glibc.kill(process.processIdentifier, SIGKILL) }
    process.waitUntilExit()
  }

  /// Lets it end, and what it printed.
  func finish() throws -> [String] {
    try input.fileHandleForWriting.close()
    process.waitUntilExit()
    let text = try output.fileHandleForReading.readToEnd().map {
      String(decoding: $0, as: UTF8.self)
    }
    return (text ?? "").split(separator: "\n").map(String.init)
  }
}

@Suite("Firecracker is another process")
struct FirecrackerProcessTests {
  @Test("It is known by its number, served, and gets zeros for what it gave back")
  func serves() throws {
    try withTemporaryDirectory { directory in
      let image = try makePatternImage(directory + "/image", regions: imageRegions([100, 412]))
      let firecracker = try FirecrackerProcess(directory, regions: 8, pages: 64)
      let handover = try FirecrackerHandover.receive(on: firecracker.socket)
      #expect(handover.peer.processID == firecracker.process.processIdentifier)
      let session = try makeSession(handover, image)
      try session.start()
      #expect(try firecracker.finish() == ["sent", "wrong 0", "not zero 0"])
      #expect(Delay.until { session.hasEnded })
      session.release()
    }
  }

  @Test(
    "Huge pages that are not reserved are served like others, from either pool",
    .enabled(if: SmallHugePagePool.isAvailable, "needs root and 16 free pages of 2 MiB"),
    arguments: [false, true])
  func servesUnreserved(hasOwnPool: Bool) throws {
    try withTemporaryDirectory { directory in
      let image = try makePatternImage(
        directory + "/image", regions: imageRegions([4 * 512], pageSize: .size2MiB))
      let pool = try SmallHugePagePool(pages: 4)
      let file = try pool.makeFile(pages: 4)
      let firecracker = try FirecrackerProcess(
        directory, regions: 2, pages: 2, pageSize: .size2MiB,
        memory: hasOwnPool ? SmallHugePagePool.path(of: file).string : "unreserved")
      let handover = try FirecrackerHandover.receive(on: firecracker.socket)
      let session = try makeSession(handover, image)
      try session.start()
      #expect(try firecracker.finish() == ["sent", "wrong 0", "not zero 0"])
      #expect(pool.freePages == 4, "the process has ended, and its pages were private")
      #expect(Delay.until { session.hasEnded })
      session.release()
    }
  }

  @Test("A VM that is killed ends its session, and the connection")
  func killed() throws {
    try withTemporaryDirectory { directory in
      let image = try makePatternImage(directory + "/image", regions: imageRegions([512]))
      let firecracker = try FirecrackerProcess(directory, regions: 8, pages: 64)
      let handover = try FirecrackerHandover.receive(on: firecracker.socket)
      let session = try makeSession(handover, image)
      try session.start()
      firecracker.kill()
      #expect(Delay.until { session.hasEnded })
      #expect(try firecracker.socket.receive(limit: 1).bytes.isEmpty)
      session.release()
    }
  }

  @Test("Sessions of VMs that came and went leave no descriptor behind")
  func leavesNothingBehind() async {
    await #expect(processExitsWith: .success) {
      try withTemporaryDirectory { directory in
        let image = try makePatternImage(directory + "/image", regions: imageRegions([64]))
        func cycle() throws {
          let firecracker = try FirecrackerProcess(directory, regions: 2, pages: 32)
          let handover = try FirecrackerHandover.receive(on: firecracker.socket)
          let session = try makeSession(handover, image)
          try session.start()
          _ = try firecracker.finish()
          session.release()
        }
        for _ in 0..<3 { try cycle() }
        let before = openDescriptorCount()
        for _ in 0..<10 { try cycle() }
        precondition(Delay.until { openDescriptorCount() <= before }, "descriptors leak")
        precondition(openDescriptors(of: "userfaultfd") == 0)
        precondition(openDescriptors(of: "pidfd") == 0)
      }
    }
  }
}
