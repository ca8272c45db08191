// SPDX-License-Identifier: Apache-2.0

import FaultlineDaemon
import Foundation
import HandoverClient
import HandoverProtocol
import LinuxSystem
import SystemPackage
import TestSupport
import Testing
import Userfault

@Suite("A guest that is let go of has no wrong page", .serialized)
struct LettingGoTests {
  /// Long enough that filling it takes a while.
  private static let pages = 16_384

  private func withGuest(
    _ arguments: [String] = [],
    _ body: (Service, FakeFirecracker) throws -> Void
  ) throws {
    try withTemporaryDirectory { directory in
      let service = try Service(
        in: directory, handover: "faultline", regions: [Self.pages, Self.pages], arguments)
      let vmm = try FakeFirecracker(regions: 2, pages: Self.pages)
      let client = try attach(service, vmm)
      try body(service, vmm)
      withExtendedLifetime(client) {}
    }
  }

  @Test("Whoever stops the filling meanwhile does not harm it")
  func fillIsStopped() throws {
    try withGuest { service, vmm in
      #expect(try service.request("DELETE", "/v1/sessions/1").hasPrefix("HTTP/1.1 202"))
      for _ in 0..<20 {
        for (method, path) in [
          ("DELETE", "/v1/sessions/1/fill"), ("POST", "/v1/sessions/1/fill"),
          ("DELETE", "/v1/sessions/1"),
        ] {
          let answer = try service.request(method, path)
          // It is under way, or done.
          #expect(
            answer.hasPrefix("HTTP/1.1 409") || answer.hasPrefix("HTTP/1.1 404"), "\(answer)")
        }
      }
      #expect(Delay.until { (try? service.sessions().isEmpty) == true })
      let found = try #require(pagesInMemory(vmm))
      #expect(found == (2 * Self.pages, 0))
    }
  }

  @Test("A drain that has no time left says so, and what is missing is a memory error")
  func drainRunsOut() throws {
    try withGuest(["--drain-timeout", "100ms"]) { service, vmm in
      service.daemon.send(SIGTERM)
      let status = service.daemon.wait()
      let found = try #require(pagesInMemory(vmm))
      #expect(status == (found.errors > 0 ? 3 : 0), "\(found) \(service.daemon.messages)")
    }
  }

  @Test("The second signal ends the daemon without more filling, and no page turns into zeros")
  func secondSignal() throws {
    try withGuest(["--drain-timeout", "1h"]) { service, vmm in
      service.daemon.send(SIGTERM)
      #expect(Delay.until { service.daemon.logged("sessions are filled, for at most") })
      service.daemon.send(SIGINT)
      let status = service.daemon.wait()
      let found = try #require(pagesInMemory(vmm))
      #expect(status == (found.errors > 0 ? 3 : 0), "\(found) \(service.daemon.messages)")
    }
  }

  @Test("A VMM that touches a page without right content is ended, where that is configured")
  func stopVMM() throws {
    try withTemporaryDirectory { directory in
      try makeDamagedImage(directory + "/base.img", block: 700)
      let service = try Service(in: directory, ["--on-damage", "stop-vmm"])
      let guest = try FirecrackerProcess(service.socket)
      #expect(guest.wasKilled())
      #expect(Delay.until { service.daemon.logged("has ended") })
      #expect(Delay.until { (try? service.sessions().isEmpty) == true })
      let metrics = try service.request("GET", "/metrics")
      #expect(metrics.contains("faultline_pages_total{resolution=\"failed\"} 1\n"))
    }
  }

  @Test("A VMM that leaves while it is let go of leaves no thread that spins")
  func leavesMeanwhile() throws {
    try withTemporaryDirectory { directory in
      let service = try Service(
        in: directory, handover: "faultline", regions: [Self.pages, Self.pages])
      let threads = service.daemon.count("task")
      for round in 0..<6 {
        let vmm = try FakeFirecracker(regions: 2, pages: Self.pages)
        let client = try attach(service, vmm)
        let answer = try service.request("DELETE", "/v1/sessions/\(client.session)")
        #expect(answer.hasPrefix("HTTP/1.1 202"))
        Delay.microseconds(UInt32(round) * 3000)
      }
      #expect(Delay.until { (try? service.sessions().isEmpty) == true })
      #expect(Delay.until { service.daemon.count("task") <= threads + 2 })
      let before = service.daemon.processorTicks
      Delay.microseconds(500_000)
      #expect(service.daemon.processorTicks - before < 25)
      service.daemon.send(SIGTERM)
      #expect(service.daemon.wait() == 0)
    }
  }

  /// How the session of a VMM with a damaged page ends.
  enum Ending: String, CaseIterable { case drain, stop, close }

  @Test(
    "Whoever is let go of with a page without right content makes the status 3",
    arguments: Ending.allCases)
  func damage(ending: Ending) throws {
    try withTemporaryDirectory { directory in
      try makeDamagedImage(directory + "/base.img", block: 700)
      let service = try Service(in: directory, handover: "faultline")
      let vmm = try FakeFirecracker(regions: 2, pages: 512)
      var client = Optional(try attach(service, vmm))
      switch ending {
      case .drain: break
      case .stop:
        #expect(try faultline("stop", "1", "--control-socket", service.control).status == 0)
      case .close: client = nil
      }
      if ending != .drain { #expect(Delay.until { (try? service.sessions().isEmpty) == true }) }
      service.daemon.send(SIGTERM)
      #expect(service.daemon.wait() == (ending == .close ? 0 : 3))
      #expect(
        service.daemon.logged("pages of it are memory errors") == (ending != .close),
        "\(service.daemon.messages)")
      if ending != .close { #expect(pagesInMemory(vmm).map { $0 == (1023, 1) } == true) }
      withExtendedLifetime(client) {}
    }
  }

  /// The kernel asks whether memory is registered, and not with whose userfaultfd.
  @Test("Memory that a process hands over anew is served by the new session only")
  func handedOverAnew() throws {
    try withTemporaryDirectory { directory in
      let service = try Service(in: directory, handover: "faultline", regions: [512])
      let memory = try Mapping(anonymous: 512 * 4096)
      func attach() throws -> (HandoverClient, HeldUserfaultfd) {
        let held = HeldUserfaultfd(try Userfaultfd(requiring: .removeEvents))
        try held.userfaultfd.register(memory.range, modes: .missing)
        let region = AttachMessage.Region(
          hostAddress: memory.range.start.rawValue, length: UInt64(memory.range.length), offset: 0)
        let client = try HandoverClient(
          attachingTo: FilePath(service.socket), regions: [region], userfaultfd: held.userfaultfd,
          timeoutMilliseconds: 60_000)
        return (client, held)
      }
      let (first, firstHeld) = try attach()
      // The first session knows all of it as given up.
      try memory.advise(.dontNeed, offset: 0, length: memory.length)
      #expect(Delay.until { service.removeEvents == 1 })
      try firstHeld.userfaultfd.unregister(memory.range)
      let (second, secondHeld) = try attach()
      #expect(Delay.until { (try? service.sessions().map(\.id)) == ["2"] })
      for block in 0..<512 {
        let found = guardedLoad(memory.range, offset: block * 4096)
        #expect(found == .value(PatternSource.word(block: block, seed: 7)), "block \(block)")
      }
      withExtendedLifetime((first, firstHeld, second, secondHeld)) {}
    }
  }
}

private final class HeldUserfaultfd: Sendable {
  let userfaultfd: Userfaultfd
  init(_ userfaultfd: consuming Userfaultfd) { self.userfaultfd = userfaultfd }
}
