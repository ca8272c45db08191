// SPDX-License-Identifier: Apache-2.0

import Foundation
import LinuxSystem
import SystemPackage
import TestSupport
import Testing

@Suite("The daemon as a service of systemd")
struct SystemdTests {
  @Test(
    "It says when it is ready, that it lives, and that it stops", arguments: [true, false])
  func notifies(isAbstract: Bool) throws {
    try withTemporaryDirectory { directory in
      let path = isAbstract ? "@faultline-\(UUID().uuidString)" : directory + "/notify"
      let socket = try NotifySocket(path)
      let service = try Service(
        in: directory,
        environment: ["NOTIFY_SOCKET": path, "WATCHDOG_USEC": "200000"])
      #expect(socket.next()?.hasPrefix("READY=1\n") == true)
      #expect(FileManager.default.fileExists(atPath: service.socket))
      // Sooner than WATCHDOG_USEC, and by far than without it; one may have waited for a processor.
      let start = MonotonicClock.nanoseconds
      for _ in 0..<5 { #expect(socket.next()?.hasPrefix("WATCHDOG=1\n") == true) }
      #expect(MonotonicClock.nanoseconds - start < 20_000_000_000)
      service.daemon.send(SIGTERM)
      var last = socket.next()
      while last?.hasPrefix("WATCHDOG=1\n") == true { last = socket.next() }
      #expect(last?.hasPrefix("STOPPING=1\n") == true)
      #expect(service.daemon.wait() == 0)
    }
  }

  @Test("It serves sockets that it inherits, each once, and leaves their files alone")
  func activation() throws {
    try withTemporaryDirectory { directory in
      _ = try makePatternImage(directory + "/base.img", regions: imageRegions([512, 512]))
      let text = """
        listen:
          - socket: \(directory)/a/vmm.sock
            image: \(directory)/base.img
          - socket: \(directory)/b/vmm.sock
            image: \(directory)/base.img
        """
      let file = directory + "/config.yaml"
      try text.write(toFile: file, atomically: true, encoding: .utf8)
      for name in ["a", "b"] {
        try FileManager.default.createDirectory(
          atPath: directory + "/" + name, withIntermediateDirectories: false)
      }
      // Only one of two with the same last part.
      let listener = try UnixListener(path: FilePath(directory + "/b/vmm.sock"))
      // This one connects before there is a daemon.
      let early = try FirecrackerProcess(directory + "/b/vmm.sock")
      let daemon = try DaemonProcess(
        in: directory, ["--config", file], launcher: Self.launcher("vmm.sock"),
        input: FileHandle(fileDescriptor: listener.descriptor.rawValue, closeOnDealloc: false))
      #expect(try early.finish() == ServeTests.right)
      for name in ["a", "b"] {
        let guest = try FirecrackerProcess(directory + "/\(name)/vmm.sock")
        #expect(try guest.finish() == ServeTests.right)
      }
      daemon.send(SIGTERM)
      #expect(daemon.wait() == 0)
      #expect(!FileManager.default.fileExists(atPath: directory + "/a/vmm.sock"))
      #expect(FileManager.default.fileExists(atPath: directory + "/b/vmm.sock"))
      withExtendedLifetime(listener.descriptor.rawValue) {}
    }
  }

  @Test("A descriptor that is not for it is an error, before a VMM waits there for ever")
  func unknownDescriptor() throws {
    try withTemporaryDirectory { directory in
      _ = try makePatternImage(directory + "/base.img", regions: imageRegions([8]))
      let arguments = ["--socket", directory + "/vmm.sock", "--image", directory + "/base.img"]
      let listener = try UnixListener(path: FilePath(directory + "/other.sock"))
      let socket = FileHandle(
        fileDescriptor: listener.descriptor.rawValue, closeOnDealloc: false)
      for (input, words) in [
        (socket, "is none of the configuration's"),
        (FileHandle.nullDevice, "is no Unix stream socket that listens"),
      ] {
        let daemon = try DaemonProcess(
          in: directory, arguments, launcher: Self.launcher("x"), input: input, waits: false)
        #expect(daemon.wait() == 1)
        #expect(daemon.logged(words), "\(daemon.messages)")
      }
      #expect(listener.descriptor.rawValue >= 0)
    }
  }

  /// Passes standard input on as the first descriptor of sd_listen_fds(3).
  private static func launcher(_ name: String) -> [String] {
    let script =
      "exec 3<&0 </dev/null; export LISTEN_PID=$$ LISTEN_FDS=1 LISTEN_FDNAMES=\(name); exec \"$@\""
    return ["/bin/sh", "-c", script, "sh"]
  }

  @Test("It needs no capability, and not /dev/userfaultfd")
  func unprivileged() throws {
    try withTemporaryDirectory { directory in
      // A test that is no root has none to begin with.
      let launcher =
        geteuid() == 0
        ? ["/usr/bin/setpriv", "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs"] : []
      let service = try Service(in: directory, launcher: launcher)
      let status = try String(
        contentsOfFile: "/proc/\(service.daemon.identifier)/status", encoding: .utf8)
      #expect(status.contains("CapEff:\t0000000000000000\n"))
      #expect(try FirecrackerProcess(service.socket).finish() == ServeTests.right)
    }
  }
}

/// Where a service manager listens for sd_notify(3).
final class NotifySocket {
  private let descriptor: OwnedDescriptor

  /// - Parameter path: with an at sign first, an abstract name.
  init(_ path: String) throws {
    let number = socket(AF_UNIX, CInt(SOCK_DGRAM.rawValue) | CInt(SOCK_CLOEXEC.rawValue), 0)
    guard number >= 0 else { throw Errno(rawValue: errno) }
    descriptor = OwnedDescriptor(owning: number)
    var address = sockaddr_un()
    address.sun_family = sa_family_t(AF_UNIX)
    var bytes = Array(path.utf8)
    if bytes.first == UInt8(ascii: "@") { bytes[0] = 0 }
    unsafe withUnsafeMutableBytes(of: &address.sun_path) { unsafe $0.copyBytes(from: bytes) }
    let length = socklen_t(MemoryLayout<sa_family_t>.size + bytes.count)
    let result = unsafe withUnsafePointer(to: &address) { pointer in
      unsafe pointer.withMemoryRebound(to: sockaddr.self, capacity: 1) {
        // SAFETY: the address is at least as long as `length` says.
        unsafe bind(number, $0, length)
      }
    }
    guard result == 0 else { throw Errno(rawValue: errno) }
  }

  /// The next message; `nil` when none comes for a minute.
  func next() -> String? {
    guard (try? PollSet(descriptor.rawValue, -1).wait(milliseconds: 60_000)) != nil else {
      return nil
    }
    var bytes = [UInt8](repeating: 0, count: 4096)
    let count = unsafe recv(descriptor.rawValue, &bytes, bytes.count, 0)
    return count > 0 ? String(decoding: bytes.prefix(count), as: UTF8.self) : nil
  }
}
