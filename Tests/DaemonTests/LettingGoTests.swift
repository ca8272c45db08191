// SPDX-License-Identifier: Apache-2.0

import Foundation
import HandoverClient
import LinuxSystem
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
}
