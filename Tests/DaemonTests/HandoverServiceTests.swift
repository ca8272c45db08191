// SPDX-License-Identifier: Apache-2.0

import FaultlineDaemon
import Foundation
import HandoverClient
import HandoverProtocol
import LinuxSystem
import MemoryImage
import Synchronization
import SystemPackage
import TestSupport
import Testing
import Userfault

@Suite("The daemon speaks docs/handover.md")
struct HandoverServiceTests {
  @Test("A VMM is served by its name, is told when all is there, and leaves")
  func serves() throws {
    try withTemporaryDirectory { directory in
      let service = try Service(in: directory, handover: "faultline")
      let vmm = try FakeFirecracker(regions: 2, pages: 512)
      do {
        let client = try attach(
          service, vmm, name: "vm 17", options: .init(fillRate: 1 << 30))
        #expect(try service.sessions().map(\.name) == ["vm 17"])
        #expect(try vmm.wrongBlocks() == 0)
        #expect(try client.nextStatus(waitingMilliseconds: 60_000) == .filled)
      }
      #expect(Delay.until { service.daemon.logged("its connection was closed") })
      #expect(Delay.until { (try? service.sessions().isEmpty) == true })
    }
  }

  @Test("A VMM that closes and goes on never reads zeros for what was not there")
  func leavesEarly() throws {
    try withTemporaryDirectory { directory in
      let service = try Service(in: directory, handover: "faultline")
      let vmm = try FakeFirecracker(regions: 1, pages: 1024)
      do {
        let client = try attach(service, vmm)
        #expect(vmm.word(region: 0, page: 3) == PatternSource.word(block: 3, seed: 7))
        try vmm.giveBack(region: 0, page: 5)
        // Nobody would read the event of that once the session ends.
        #expect(Delay.until { service.removeEvents == 1 })
        withExtendedLifetime(client) {}
      }
      #expect(Delay.until { service.daemon.logged("has ended") })
      let range = vmm.ranges[0]
      #expect(guardedLoad(range, offset: 3 * 4096) == .value(PatternSource.word(block: 3, seed: 7)))
      #expect(guardedLoad(range, offset: 5 * 4096) == .value(0))
      #expect(guardedLoad(range, offset: 900 * 4096) == .busError)
    }
  }

  @Test("An image by its name; one that is not there is refused in words")
  func images() throws {
    try withTemporaryDirectory { directory in
      for name in ["one", "two"] {
        _ = try makePatternImage(directory + "/\(name).img", regions: imageRegions([512, 512]))
      }
      let socket = directory + "/vmm.sock"
      let daemon = try DaemonProcess(
        in: directory,
        ["--socket", socket, "--handover", "faultline", "--image", directory + "/{image}.img"])
      let vmm = try FakeFirecracker(regions: 2, pages: 512)
      let region = AttachMessage.Region(
        hostAddress: vmm.ranges[0].start.rawValue, length: 4096 * 512, guestAddress: 0)
      for (image, code) in [("three", "unknown_image"), ("../one", "malformed")] {
        let error = #expect(throws: HandoverClientError.self) {
          _ = try HandoverClient(
            attachingTo: FilePath(socket), regions: [region], userfaultfd: vmm.userfaultfd,
            image: image, timeoutMilliseconds: 60_000)
        }
        #expect(error?.serviceCode == code, "\(String(describing: error))")
      }
      let client = try HandoverClient(
        attachingTo: FilePath(socket), regions: [region], userfaultfd: vmm.userfaultfd,
        image: "two", timeoutMilliseconds: 60_000)
      #expect(vmm.word(region: 0, page: 9) == PatternSource.word(block: 9, seed: 7))
      withExtendedLifetime((client, daemon)) {}
    }
  }

  @Test("A damaged page is told to the VMM, with its place")
  func damage() throws {
    try withTemporaryDirectory { directory in
      try makeDamagedImage(directory + "/base.img", block: 100)
      let service = try Service(in: directory, handover: "faultline")
      let vmm = try FakeFirecracker(regions: 2, pages: 512)
      let client = try attach(service, vmm)
      let address = vmm.ranges[0].start.rawValue + 100 * 4096
      #expect(guardedLoad(vmm.ranges[0], offset: 100 * 4096) == .busError)
      let status = try #require(try client.nextStatus(waitingMilliseconds: 60_000))
      #expect(status.event == "poisoned" && status.hostAddress == address)
      #expect(vmm.word(region: 1, page: 4) == PatternSource.word(block: 516, seed: 7))
      #expect(try service.sessions().map(\.failedPages) == [1])
      // Its end would be that of the session.
      withExtendedLifetime(client) {}
    }
  }

  @Test("What was recorded goes into the image, and comes first the next time")
  func workingSet() throws {
    try withTemporaryDirectory { directory in
      let service = try Service(in: directory, handover: "faultline")
      let touched = [700, 3, 90]
      do {
        let vmm = try FakeFirecracker(regions: 2, pages: 512)
        let client = try attach(service, vmm, options: .init(record: true))
        for block in touched { _ = vmm.word(region: block / 512, page: block % 512) }
        let list = try service.request("GET", "/v1/sessions/1/working-set")
        #expect(list.contains("{\"block_count\":1,\"first_block\":188,\"region\":1}"), "\(list)")
        #expect(try service.request("POST", "/v1/sessions/1/working-set").hasPrefix("HTTP/1.1 200"))
        withExtendedLifetime(client) {}
      }
      #expect(Delay.until { (try? service.sessions().isEmpty) == true })
      let vmm = try FakeFirecracker(regions: 2, pages: 512)
      let client = try attach(service, vmm)
      #expect(Delay.until { (try? service.sessions().first?.fill.phase) == "done" })
      for block in touched {
        #expect(
          vmm.word(region: block / 512, page: block % 512)
            == PatternSource.word(block: block, seed: 7))
      }
      #expect(try service.sessions().map(\.faults) == [0])
      #expect(try service.request("POST", "/v1/sessions/2/working-set").hasPrefix("HTTP/1.1 409"))
      withExtendedLifetime(client) {}
    }
  }

  @Test("What the daemon takes for a guest does not depend on the order of its working set")
  func memory() throws {
    try withTemporaryDirectory { directory in
      let blocks = (1 << 30) / 4096
      let path = directory + "/base.img"
      let writer = try ImageWriter(path: FilePath(path), regions: imageRegions([blocks]))
      try writer.finish()
      var random = SeededRandom(seed: 3)
      let runs = (0..<blocks).shuffled(using: &random).map {
        WorkingSetRun(region: 0, firstBlock: $0, blockCount: 1)
      }
      try MemoryImage.setWorkingSet(runs, of: FilePath(path))
      let service = try Service(in: directory, handover: "faultline", image: path)
      let before = service.daemon.anonymousKiB
      var guests: [(FakeFirecracker, HandoverClient)] = []
      for _ in 0..<3 {
        let vmm = try FakeFirecracker(regions: 1, pages: blocks)
        guests.append((vmm, try attach(service, vmm)))
      }
      #expect(
        Delay.until { (try? service.sessions().allSatisfy { $0.fill.phase == "done" }) == true })
      let growth = service.daemon.anonymousKiB - before
      // SPECIFICATION.md: 1 MiB for each GiB of guest, and 256 KiB for each session.
      #expect(growth <= 3 * (1024 + 256), "\(growth) KiB")
      #expect(try service.sessions().map(\.faults) == [0, 0, 0])
      withExtendedLifetime(guests) {}
    }
  }

  @Test("An operator begins and ends a recording, and puts it into the image")
  func recording() throws {
    try withTemporaryDirectory { directory in
      let service = try Service(in: directory, handover: "faultline")
      func record(_ options: String...) throws -> (status: Int32, output: String, errors: String) {
        try CommandProcess(
          ["record", "1", "--control-socket", service.control] + options
        ).wait()
      }
      func touch(_ block: Int, _ vmm: FakeFirecracker) {
        #expect(
          vmm.word(region: block / 512, page: block % 512)
            == PatternSource.word(block: block, seed: 7))
      }
      let vmm = try FakeFirecracker(regions: 2, pages: 512)
      let client = try attach(service, vmm)
      #expect(try service.request("POST", "/v1/sessions/1/working-set").hasPrefix("HTTP/1.1 409"))
      #expect(try service.sessions().map(\.records) == [false])
      touch(7, vmm)
      #expect(try record().output == "session 1 records\n")
      #expect(try service.sessions().map(\.records) == [true])
      touch(900, vmm)
      touch(40, vmm)
      #expect(try record("--stop").output == "session 1 records no more\n")
      touch(500, vmm)
      #expect(try record("--json").output.contains("\"records\":true"))
      touch(70, vmm)
      let stored = try record("--store")
      #expect(stored.output.hasPrefix("session 1 records no more; what it recorded is in"))
      touch(600, vmm)
      let image = try MemoryImage(path: FilePath(directory + "/base.img"))
      let runs = try #require(try image.workingSet()).runs
      #expect(runs.map { $0.region * 512 + $0.firstBlock } == [900, 40, 70], "\(runs)")
      #expect(try service.sessions().map(\.records) == [false])
      #expect(try service.request("POST", "/v1/sessions/9/recording").hasPrefix("HTTP/1.1 404"))
      withExtendedLifetime(client) {}
    }
  }

  @Test("The filling can be started and stopped, with a rate that makes sense")
  func fill() throws {
    try withTemporaryDirectory { directory in
      let service = try Service(in: directory, handover: "faultline")
      let vmm = try FakeFirecracker(regions: 2, pages: 512)
      let client = try attach(service, vmm)
      #expect(
        try service.request("POST", "/v1/sessions/1/fill", body: "{\"rate\":0}")
          .hasPrefix("HTTP/1.1 400"))
      #expect(
        try service.request("POST", "/v1/sessions/1/fill", body: "{\"rate\":\"x\"}")
          .hasPrefix("HTTP/1.1 400"))
      #expect(
        try service.request("POST", "/v1/sessions/1/fill", body: "{\"rate\":4096}")
          .hasPrefix("HTTP/1.1 202"))
      // Its thread has to come first.
      #expect(Delay.until { (try? service.sessions().first?.fill.phase) == "filling" })
      #expect(try service.request("DELETE", "/v1/sessions/1/fill").hasPrefix("HTTP/1.1 202"))
      #expect(try service.sessions().first?.fill.phase == "idle")
      #expect(try service.request("POST", "/v1/sessions/1/fill").hasPrefix("HTTP/1.1 202"))
      #expect(try client.nextStatus(waitingMilliseconds: 60_000) == .filled)
    }
  }
}
