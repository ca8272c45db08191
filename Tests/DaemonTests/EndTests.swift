// SPDX-License-Identifier: Apache-2.0

import Foundation
import TestSupport
import Testing

@Suite("What is no reason for the daemon to end")
struct EndTests {
  @Test("Signals that are not for it", arguments: [SIGHUP, SIGUSR1, SIGUSR2, SIGPIPE, SIGXFSZ])
  func signals(number: Int32) throws {
    try withTemporaryDirectory { directory in
      // A thread of a test blocks signals, and a process that it starts inherits that.
      let unblock =
        "sigprocmask(SIG_SETMASK, POSIX::SigSet->new); $SIG{$_} = 'DEFAULT' for qw(HUP PIPE); "
        + "exec @ARGV"
      let service = try Service(
        in: directory, launcher: ["/usr/bin/perl", "-MPOSIX", "-e", unblock])
      let guest = try FirecrackerProcess(service.socket)
      #expect(Delay.until { (try? service.sessions().count) == 1 })
      service.daemon.send(number)
      if ![SIGPIPE, SIGXFSZ].contains(number) {
        let isThere = Delay.until {
          service.daemon.logged("does nothing here") || !service.daemon.isRunning
        }
        #expect(isThere && service.daemon.isRunning)
      }
      #expect(try guest.finish() == ServeTests.right)
      #expect(try FirecrackerProcess(service.socket).finish() == ServeTests.right)
      service.daemon.send(SIGTERM)
      #expect(service.daemon.wait() == 0)
    }
  }

  @Test(
    "A VMM that is killed while it faults, when there can be no more threads",
    .enabled(if: ProcessGroup.isThere, "no cgroup v1 of pids that can be changed"))
  func threadLimit() throws {
    try withTemporaryDirectory { directory in
      let pages = 16_384
      let service = try Service(in: directory, regions: [pages, pages])
      let group = try ProcessGroup()
      defer { group.remove(daemon: service.daemon.identifier) }
      try group.add(service.daemon.identifier)
      for round in 1...10 {
        let guests = try (0..<2).map { _ in
          try FirecrackerProcess(service.socket, pages: pages)
        }
        #expect(Delay.until { (try? service.sessions().count) == 2 })
        try group.setLimit(try group.count())
        // In the middle of its faults.
        Delay.microseconds(UInt32(round) * 300)
        for guest in guests { guest.kill() }
        #expect(Delay.until { (try? service.sessions().isEmpty) == true })
        try #require(service.daemon.isRunning, "\(service.daemon.messages.suffix(2000))")
        // Another one is taken, by a thread in reserve.
        let late = try FirecrackerProcess(service.socket, pages: pages)
        #expect(Delay.until { (try? service.sessions().count) == 1 })
        late.kill()
        #expect(Delay.until { (try? service.sessions().isEmpty) == true })
        try group.setLimit(nil)
      }
      #expect(
        try FirecrackerProcess(service.socket, pages: pages).finish() == ServeTests.right)
      service.daemon.send(SIGTERM)
      #expect(service.daemon.wait() == 0)
    }
  }
}

/// A control group of the controller pids (cgroup v1), which limits processes and threads.
struct ProcessGroup {
  private static let root = "/sys/fs/cgroup/pids"
  private let path: String

  static let isThere: Bool = {
    guard let group = try? ProcessGroup() else { return false }
    group.remove(daemon: nil)
    return true
  }()

  init() throws {
    path = Self.root + "/faultline-\(UUID().uuidString)"
    try FileManager.default.createDirectory(atPath: path, withIntermediateDirectories: false)
    guard unsafe access(path + "/pids.max", W_OK) == 0 else {
      unsafe rmdir(path)
      throw CocoaError(.fileWriteNoPermission)
    }
  }

  func add(_ process: Int32) throws { try write("cgroup.procs", "\(process)") }

  /// Processes and threads in it.
  func count() throws -> Int {
    let text = try String(contentsOfFile: path + "/pids.current", encoding: .utf8)
    return Int(text.trimmingCharacters(in: .whitespacesAndNewlines)) ?? -1
  }

  func setLimit(_ limit: Int?) throws { try write("pids.max", limit.map(String.init) ?? "max") }

  /// Moves the daemon back, and removes the group.
  func remove(daemon: Int32?) {
    if let daemon {
      try? "\(daemon)".write(
        toFile: Self.root + "/cgroup.procs", atomically: false, encoding: .utf8)
    }
    _ = Delay.until(seconds: 5) { unsafe rmdir(path) == 0 }
  }

  private func write(_ name: String, _ text: String) throws {
    let file = try FileHandle(forWritingTo: URL(fileURLWithPath: path + "/" + name))
    try file.write(contentsOf: Data(text.utf8))
    try file.close()
  }
}
