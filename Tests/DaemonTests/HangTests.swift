// SPDX-License-Identifier: Apache-2.0

import CTestSupport
import Foundation
import HandoverClient
import LinuxSystem
import SystemPackage
import TestSupport
import Testing

@Suite("Storage that does not answer")
struct HangTests {
  /// A service whose image is what the VMM asks for: `base`, `pipe` or, on the filesystem that
  /// hangs, `hung`.
  private func withService(_ body: (Service) throws -> Void) throws {
    try withTemporaryDirectory { directory in
      let images = directory + "/images"
      try FileManager.default.createDirectory(atPath: images, withIntermediateDirectories: false)
      _ = try makePatternImage(images + "/base.img", regions: imageRegions([512, 512]))
      _ = unsafe mkfifo(images + "/pipe.img", 0o600)
      try FileManager.default.createSymbolicLink(
        atPath: images + "/hung.img", withDestinationPath: directory + "/hung/x.img")
      let service = try Service(
        in: directory, handover: "faultline", image: images + "/{image}.img",
        ["--drain-timeout", "10s"])
      try body(service)
    }
  }

  private func attempt(_ service: Service, _ image: String) -> HandoverClientError? {
    do {
      let vmm = try FakeFirecracker(regions: 2, pages: 512)
      let client = try attach(service, vmm, image: image)
      let wrong = try vmm.wrongBlocks()
      #expect(wrong == 0)
      withExtendedLifetime(client) {}
      return nil
    } catch {
      let failure = error as? HandoverClientError
      #expect(failure != nil, "\(error)")
      return failure
    }
  }

  @Test("A pipe is no image, and is not waited for")
  func pipe() throws {
    try withService { service in
      let error = attempt(service, "pipe")
      #expect(error?.serviceCode == "unknown_image" && "\(error!)".contains("no regular file"))
      #expect(attempt(service, "base") == nil)
      service.daemon.send(SIGTERM)
      #expect(service.daemon.wait() == 0)
    }
  }

  @Test(
    "An image that cannot be opened holds up no other, and not the daemon's end",
    .enabled(if: HungFilesystem.isThere, "no FUSE filesystem can be mounted here"))
  func hang() throws {
    try withService { service in
      let mount = try HungFilesystem(service.directory + "/hung")
      let threads = service.daemon.count("task")
      let errors = SendableBox()
      let waiting = try (0..<80).map { _ in
        try ThreadHandle.start { errors.add(self.attempt(service, "hung")) }
      }
      // They wait, and one thread waits for the file.
      #expect(Delay.until { service.daemon.threads(named: "open") >= 1 })
      for _ in 0..<5 { #expect(attempt(service, "base") == nil) }
      // All are told, though nothing has answered.
      for thread in waiting { thread.join() }
      #expect(errors.all.count == 80)
      for error in errors.all {
        #expect(error?.serviceCode == "busy", "\(String(describing: error))")
      }
      #expect(service.daemon.threads(named: "open") <= 2)
      #expect(Delay.until { service.daemon.count("task") <= threads + 4 })
      // Another one is refused at once, and others are served.
      #expect(attempt(service, "hung")?.serviceCode == "busy")
      #expect(attempt(service, "base") == nil)
      let vmm = try FakeFirecracker(regions: 2, pages: 512)
      let client = try attach(service, vmm, image: "base")
      service.daemon.send(SIGTERM)
      #expect(service.daemon.wait() == 0, "\(service.daemon.messages.suffix(2000))")
      #expect(try vmm.wrongBlocks() == 0)
      withExtendedLifetime((client, mount)) {}
    }
  }
}

private final class SendableBox: Sendable {
  private let errors = Monitor<[HandoverClientError?]>([])
  func add(_ error: HandoverClientError?) { errors.withLock { $0.append(error) } }
  var all: [HandoverClientError?] { errors.withLock { $0 } }
}

/// A FUSE filesystem that nobody serves: whoever opens a file of it waits. With its end whoever waits
/// gets an error.
final class HungFilesystem: Sendable {
  private let path: String
  private let device: OwnedDescriptor

  static let isThere: Bool = {
    let isMounted: ()? = try? withTemporaryDirectory { directory in
      // It goes before the directory does: removing that would wait.
      _ = try HungFilesystem(directory + "/hung")
    }
    return isMounted != nil
  }()

  init(_ path: String) throws {
    try FileManager.default.createDirectory(atPath: path, withIntermediateDirectories: false)
    let number = unsafe open("/dev/fuse", O_RDWR | O_CLOEXEC)
    guard number >= 0 else { throw Errno(rawValue: errno) }
    device = OwnedDescriptor(owning: number)
    self.path = path
    let options = "fd=\(number),rootmode=40000,user_id=\(getuid()),group_id=\(getgid())"
    let result = unsafe options.withCString { options in
      unsafe mount("faultline-test", path, "fuse", 0, options)
    }
    guard result == 0 else { throw Errno(rawValue: errno) }
  }

  deinit {
    let detach: Int32 = 2
    _ = unsafe umount2(path, detach)
  }
}
