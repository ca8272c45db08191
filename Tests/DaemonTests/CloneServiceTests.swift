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

@Suite("Clones of an image through the daemon")
struct CloneServiceTests {
  /// Bytes of those blocks that have data.
  private func data(_ blocks: Int) -> Int {
    (0..<blocks).count { PatternSource.word(block: $0, seed: 7) != 0 } * 4096
  }

  @Test("Clones in several processes have the image, and what each wrote; memory counts once")
  func processes() throws {
    try withTemporaryDirectory { directory in
      let service = try Service(in: directory, handover: "faultline")
      let descriptors = service.daemon.descriptorCount
      let clones = try (0..<3).map { _ in try CloneProcess(service.socket) }
      #expect(try service.sessions().map(\.clone) == [true, true, true])
      for clone in clones { #expect(try clone.ask("verify") == "wrong 0") }
      #expect(try service.metric("faultline_caches") == 1)
      #expect(try service.metric("faultline_clones") == 3)
      #expect(try service.metric("faultline_cache_bytes") == data(1024))
      #expect(try service.metric("faultline_pages_total{resolution=\"copied\"}") == 0)
      for (number, clone) in clones.enumerated() {
        #expect(try clone.ask("write \(number + 1)") == "written")
      }
      #expect(try clones[1].ask("give-back 8") == "given back")
      for clone in clones { #expect(try clone.ask("verify") == "wrong 0") }
      let late = try CloneProcess(service.socket)
      #expect(try late.ask("verify") == "wrong 0")
      #expect(try service.metric("faultline_cache_bytes") == data(1024))
      // The first ones go, and the last one has all of it yet.
      for clone in clones { try clone.finish() }
      #expect(try late.ask("verify") == "wrong 0")
      late.kill()
      #expect(service.isEmpty(descriptors: descriptors), "\(service.daemon.descriptorCount)")
      #expect(try service.metric("faultline_caches") == 0)
      #expect(try service.metric("faultline_cache_bytes") == 0)
      #expect(service.daemon.logged(", a clone"))
    }
  }

  @Test(
    "Clones on huge pages",
    .enabled(
      if: Host.hasHugePages(24), "needs 24 free 2 MiB pages in /proc/sys/vm/nr_hugepages"))
  func hugePages() throws {
    try withTemporaryDirectory { directory in
      let service = try Service(in: directory, handover: "faultline", regions: [1024, 512])
      let clones = try (0..<2).map { _ in
        try CloneProcess(service.socket, pageSize: 2 << 20)
      }
      for clone in clones { #expect(try clone.ask("verify") == "wrong 0") }
      #expect(try service.metric("faultline_cache_bytes") == 6 << 20)
      #expect(try clones[0].ask("write 5") == "written")
      #expect(try clones[1].ask("give-back 600") == "given back")
      for clone in clones { #expect(try clone.ask("verify") == "wrong 0") }
      // The same image in small pages is a cache of its own.
      let small = try CloneProcess(service.socket)
      #expect(try small.ask("verify") == "wrong 0")
      #expect(try service.metric("faultline_caches") == 2)
    }
  }

  @Test("With a limit pages are kept for later clones, and make room for other images")
  func limit() throws {
    try withTemporaryDirectory { directory in
      for name in ["one", "two"] {
        _ = try makePatternImage(directory + "/\(name).img", regions: imageRegions([512, 512]))
      }
      let service = try Service(
        in: directory, handover: "faultline", image: directory + "/{image}.img",
        ["--cache-size", "5M"])
      let limit = 5 << 20
      #expect(try service.metric("faultline_cache_limit_bytes") == limit)
      func run(_ image: String) throws {
        let clone = try CloneProcess(service.socket, image: image)
        #expect(try clone.ask("verify") == "wrong 0")
        try clone.finish()
        #expect(Delay.until { (try? service.sessions().isEmpty) == true })
      }
      try run("one")
      #expect(try service.metric("faultline_cache_bytes") == data(1024))
      // What was kept is not read again: only zeros are no part of it.
      try run("one")
      #expect(try service.metric("faultline_cache_bytes") == data(1024))
      #expect(try service.metric("faultline_cache_evicted_pages_total") == 0)
      let steady = try CloneProcess(service.socket, image: "two")
      #expect(try steady.ask("verify") == "wrong 0")
      #expect(try service.metric("faultline_cache_evicted_pages_total") > 100)
      #expect(try service.metric("faultline_cache_bytes") <= limit)
      #expect(try service.metric("faultline_caches") == 2)
      // What finds no room is a clone's alone, and what a clone has stays.
      let copied = "faultline_pages_total{resolution=\"copied\"}"
      #expect(try service.metric(copied) == 0)
      let clones = try (0..<2).map { _ in try CloneProcess(service.socket, image: "one") }
      for clone in clones + [steady] { #expect(try clone.ask("verify") == "wrong 0") }
      #expect(try service.metric(copied) > 0)
      #expect(try service.metric("faultline_cache_bytes") <= limit)
    }
  }

  @Test("A clone that is killed leaves nothing, at whatever it was", arguments: [0, 1, 5, 20, 60])
  func killed(milliseconds: UInt32) throws {
    try withTemporaryDirectory { directory in
      let service = try Service(in: directory, handover: "faultline")
      let descriptors = service.daemon.descriptorCount
      let other = try CloneProcess(service.socket)
      for _ in 0..<3 {
        let clone = try CloneProcess(service.socket)
        try clone.start("verify")
        try clone.start("write 9")
        Delay.microseconds(milliseconds * 1000)
        clone.kill()
      }
      #expect(Delay.until { (try? service.sessions().count) == 1 })
      #expect(try other.ask("verify") == "wrong 0")
      // It did not go on without its session: the cache is there for others.
      let late = try CloneProcess(service.socket)
      #expect(try late.ask("verify") == "wrong 0")
      #expect(try service.metric("faultline_caches") == 1)
      #expect(try service.metric("faultline_cache_bytes") == data(1024))
      other.kill()
      late.kill()
      let isEmpty = service.isEmpty(descriptors: descriptors)
      #expect(isEmpty, "\(service.daemon.descriptorNames)")
    }
  }

  @Test("Who opens an image and leaves is nobody's burden")
  func opensAndLeaves() throws {
    try withTemporaryDirectory { directory in
      let service = try Service(in: directory, handover: "faultline")
      let descriptors = service.daemon.descriptorCount
      for _ in 0..<4 {
        let image = try OpenedImage(
          from: FilePath(service.socket), name: "looker", timeoutMilliseconds: 60_000)
        let lengths = image.regions.map(\.length)
        let names = image.regions.map(\.name)
        #expect(lengths == [512 * 4096, 512 * 4096] && names == ["ram0", "ram1"])
      }
      #expect(service.isEmpty(descriptors: descriptors))
      #expect(
        Delay.until {
          (try? service.metric("faultline_handovers_total{result=\"opened\"}")) == 4
        })
      #expect(try service.metric("faultline_caches") == 0)
    }
  }

  @Test("A clone that goes on without its session keeps what it has", arguments: [false, true])
  func leaves(withLimit: Bool) throws {
    try withTemporaryDirectory { directory in
      let service = try Service(
        in: directory, handover: "faultline", withLimit ? ["--cache-size", "4M"] : [])
      let guest = try CloneGuest(service.socket)
      #expect(try guest.wrongBlocks(0..<256) == 0)
      for block in stride(from: 0, to: 128, by: 2) { guest.write(UInt64(block) + 1, block) }
      for block in 64..<96 { try guest.giveBack(block) }
      #expect(Delay.until { service.removeEvents == 32 })
      guest.leave()
      #expect(Delay.until { service.daemon.logged("has ended") })
      // Others have a cache of their own, which gives up pages.
      for _ in 0..<2 {
        let other = try CloneProcess(service.socket)
        #expect(try other.ask("verify") == "wrong 0")
      }
      #expect(try guest.wrongBlocks(0..<256) == 0)
      #expect(guest.guardedWord(1000) == .busError)
    }
  }

  @Test("An operator lets a clone go: all of it is there, and what it gave back is zero")
  func detach() throws {
    try withTemporaryDirectory { directory in
      let service = try Service(in: directory, handover: "faultline", ["--cache-size", "3M"])
      let guest = try CloneGuest(service.socket)
      for block in stride(from: 0, to: 1024, by: 5) { guest.write(UInt64(block) + 1, block) }
      for block in 100..<200 { try guest.giveBack(block) }
      #expect(Delay.until { service.removeEvents == 100 })
      #expect(try faultline("stop", "1", "--control-socket", service.control).status == 0)
      #expect(try service.sessions().isEmpty)
      let other = try CloneProcess(service.socket)
      #expect(try other.ask("verify") == "wrong 0")
      #expect(try guest.wrongBlocks() == 0)
    }
  }

  @Test("The daemon stops: clones have all of their memory, and need nobody")
  func drain() throws {
    try withTemporaryDirectory { directory in
      let service = try Service(in: directory, handover: "faultline")
      let guests = try (0..<3).map { _ in try CloneGuest(service.socket) }
      for (number, guest) in guests.enumerated() {
        #expect(try guest.wrongBlocks(0..<(number * 200 + 1)) == 0)
        for block in stride(from: number, to: 1024, by: 7) { guest.write(UInt64(block) + 9, block) }
        for block in 300..<310 { try guest.giveBack(block) }
      }
      #expect(Delay.until { service.removeEvents == 30 })
      service.daemon.send(SIGTERM)
      #expect(service.daemon.wait() == 0, "\(service.daemon.messages)")
      for guest in guests { #expect(try guest.wrongBlocks() == 0) }
    }
  }

  @Test("A VMM that maps something else, or reads where nobody serves, harms no other")
  func hostile() throws {
    try withTemporaryDirectory { directory in
      let service = try Service(in: directory, handover: "faultline", ["--cache-size", "64M"])
      let image = try OpenedImage(
        from: FilePath(service.socket), timeoutMilliseconds: 60_000)
      // Zeros get into the file where it has nothing yet.
      let stray = try image.regions[0].makeMapping()
      for block in 0..<512 { #expect(load(stray.range, offset: block * 4096) == 0) }
      let clone = try CloneProcess(service.socket)
      #expect(try clone.ask("verify") == "wrong 0")
      // Memory that is no mapping of the file is filled by copies.
      let userfaultfd = try Userfaultfd(requiring: .removeEvents)
      let other = try Mapping(anonymous: 512 * 4096)
      let nothing = try Mapping(anonymous: 512 * 4096)
      for range in [other.range, nothing.range] {
        try userfaultfd.register(range, modes: .missing)
      }
      let attached = [
        image.regions[0].attached(at: other.range.start),
        image.regions[1].attached(at: nothing.range.start),
      ]
      let client = try image.attach(
        attached, userfaultfd: userfaultfd, timeoutMilliseconds: 60_000)
      // Registered when it is handed over, and not afterwards.
      try userfaultfd.unregister(nothing.range)
      for block in 0..<512 {
        #expect(
          load(other.range, offset: block * 4096) == PatternSource.word(block: block, seed: 7))
      }
      withExtendedLifetime((client, service)) {}
      try stray.advise(.dontNeed, offset: 0, length: 4096)
      try other.advise(.dontNeed, offset: 0, length: 4096)
      let late = try CloneProcess(service.socket)
      for clone in [clone, late] { #expect(try clone.ask("verify") == "wrong 0") }
      // Its mappings are gone by then, and nothing else is.
      #expect(service.daemon.isRunning)
      withExtendedLifetime(client) {}
    }
  }

  @Test("A clone that asks for what there is not is refused in words")
  func refusals() throws {
    try withTemporaryDirectory { directory in
      _ = try makePatternImage(
        directory + "/many.img", regions: imageRegions([Int](repeating: 8, count: 17)))
      _ = try makePatternImage(directory + "/odd.img", regions: imageRegions([513]))
      let service = try Service(
        in: directory, handover: "faultline", image: directory + "/{image}.img")
      func refusal(_ image: String?, _ pageSize: PageSize = .size4KiB) -> HandoverClientError? {
        do throws(HandoverClientError) {
          _ = try OpenedImage(
            from: FilePath(service.socket), image: image, pageSize: pageSize,
            timeoutMilliseconds: 60_000)
          return nil
        } catch { return error }
      }
      #expect(refusal("none")?.serviceCode == "unknown_image")
      #expect(refusal(nil)?.serviceCode == "unknown_image")
      #expect(refusal("../odd")?.serviceCode == "malformed")
      #expect(refusal("many")?.serviceCode == "unsupported")
      #expect(refusal("many")?.reason.contains("17 regions") == true)
      #expect(refusal("odd", .size2MiB)?.serviceCode == "image_mismatch")
      #expect(refusal("odd") == nil)
    }
  }
}
