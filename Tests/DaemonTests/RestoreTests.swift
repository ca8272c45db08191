// SPDX-License-Identifier: Apache-2.0

import FaultlineDaemon
import Foundation
import TestSupport
import Testing

@Suite("A restored test guest has its memory from a service", .serialized)
struct RestoreTests {
  static let guests = Host.hasKVM ? ["process", "kvm"] : ["process"]

  /// A service of the images that are in a directory, by their names.
  private func makeService(
    in directory: String, handover: String = "faultline", _ arguments: [String] = []
  ) throws -> Service {
    try Service(in: directory, handover: handover, image: directory + "/{image}.img", arguments)
  }

  private func save(_ name: String, in directory: String, _ arguments: [String] = []) throws {
    let saved = try CommandProcess(
      ["snapshot", "-o", "\(directory)/\(name).img", "--level", "0"] + arguments
    ).wait()
    try #require(saved.status == 0, "\(saved)")
  }

  private func restore(
    _ name: String, _ service: Service, _ arguments: [String] = []
  ) throws -> CommandProcess {
    try CommandProcess(
      [
        "restore", "\(service.directory)/\(name).img", "--handover", service.socket,
        "--service-image", name,
      ] + arguments)
  }

  /// A guest that runs and then waits, so that it does not come to its end: it has 256 MiB and
  /// faults for each page of them, for the service records.
  private func stopWhileItRuns(_ guest: String, in directory: String) throws -> (
    CommandProcess, Service
  ) {
    try save("one", in: directory, ["--guest", guest, "--memory", "256M"])
    let service = try makeService(in: directory, ["--record"])
    let process = try restore("one", service, ["--order", "random"])
    #expect(Delay.until { ((try? service.sessions().first?.faults) ?? 0) > 16 })
    process.send(SIGSTOP)
    return (process, service)
  }

  @Test("Several at once find every page right, on each kind of memory", arguments: guests)
  func several(_ guest: String) throws {
    try withTemporaryDirectory { directory in
      try save("one", in: directory, ["--guest", guest, "--memory", "32M"])
      try save("two", in: directory, ["--guest", guest, "--memory", "16M", "--seed", "9"])
      let service = try makeService(in: directory)
      var running: [(CommandProcess, pages: Int)] = []
      let kinds = [("anonymous", "missing"), ("memfd", "missing"), ("memfd", "minor")]
      for (backing, faults) in kinds {
        for (name, pages) in [("one", 31 * 256), ("two", 15 * 256)] {
          for order in ["sequential", "random"] {
            running.append(
              (
                try restore(
                  name, service,
                  [
                    "--backing", backing, "--faults", faults, "--order", order, "--name",
                    "\(name) \(order)",
                  ]), pages
              ))
          }
        }
      }
      for (process, pages) in running {
        let outcome = process.wait()
        #expect(outcome.status == 0, "\(outcome)")
        #expect(outcome.output.contains("guest verified: \(pages) pages, 0 wrong"), "\(outcome)")
        #expect(outcome.errors.isEmpty, "\(outcome)")
      }
      #expect(Delay.until { (try? service.sessions().isEmpty) == true })
      #expect(service.daemon.logged("session 12 begins") && service.daemon.logged("two random"))
    }
  }

  @Test(
    "In huge pages, too", .enabled(if: Host.hasHugePages(16), "needs 16 free pages of 2 MiB"))
  func hugePages() throws {
    try withTemporaryDirectory { directory in
      try save("one", in: directory, ["--guest", "process", "--memory", "16M"])
      let service = try makeService(in: directory)
      for how in [["--faults", "missing"], ["--faults", "minor"], ["--clone"]] {
        let outcome = try restore("one", service, ["--backing", "hugetlb-2M"] + how).wait()
        #expect(outcome.status == 0, "\(outcome)")
        #expect(outcome.output.contains("guest verified: 3840 pages, 0 wrong"), "\(outcome)")
      }
    }
  }

  @Test("Clones that were saved while they wrote write on, each for itself", arguments: guests)
  func clones(_ guest: String) throws {
    try withTemporaryDirectory { directory in
      try save("one", in: directory, ["--guest", guest, "--memory", "32M", "--live"])
      let service = try makeService(in: directory, ["--cache-size", "1G"])
      let running = try (0..<4).map { number in
        try restore(
          "one", service,
          ["--clone", "--name", "clone \(number)", "--order", number < 2 ? "sequential" : "random"])
      }
      for process in running {
        let outcome = process.wait()
        #expect(outcome.status == 0, "\(outcome)")
        #expect(outcome.output.contains("of memfd memory, a clone"), "\(outcome)")
        #expect(outcome.output.contains("guest verified: 7936 pages, 0 wrong"), "\(outcome)")
        #expect(outcome.errors.isEmpty, "\(outcome)")
      }
      #expect(Delay.until { (try? service.sessions().isEmpty) == true })
      // All of it came once: what was copied, the guests wrote.
      let bytes = try service.metric("faultline_cache_bytes")
      #expect((31 << 20...32 << 20).contains(bytes), "\(bytes)")
      #expect(try service.metric("faultline_pages_total{resolution=\"copied\"}") == 0)
      for number in 0..<4 { #expect(service.daemon.logged("clone \(number)")) }
    }
  }

  @Test("A page without right content is told, and the guest is stopped there", arguments: guests)
  func damage(_ guest: String) throws {
    try withTemporaryDirectory { directory in
      try save("one", in: directory, ["--guest", guest, "--memory", "8M"])
      // One of the guest's blocks (docs/image-format.md).
      let file = try FileHandle(forUpdating: URL(fileURLWithPath: directory + "/one.img"))
      try file.seek(toOffset: 184)
      let data = try #require(try file.read(upToCount: 8)).reversed().reduce(0) {
        $0 << 8 | UInt64($1)
      }
      try file.seek(toOffset: data + 800 * 4096 + 123)
      try file.write(contentsOf: Data([1, 2, 3]))
      try file.close()
      let service = try makeService(in: directory)
      let outcome = try restore("one", service, ["--json"]).wait()
      #expect(outcome.status == 2, "\(outcome)")
      #expect(outcome.errors.contains("faultline: guest page 0x"), "\(outcome)")
      #expect(outcome.errors.contains("poisoned, a touch is a memory fault"), "\(outcome)")
      #expect(outcome.output.contains("\"failedPages\":1,"), "\(outcome)")
      #expect(outcome.output.contains("\"guestError\":"), "\(outcome)")
      #expect(!outcome.output.contains("verifiedPages"), "\(outcome)")
    }
  }

  @Test("A service that goes away takes the guest with it, in words", arguments: guests)
  func serviceIsKilled(_ guest: String) throws {
    try withTemporaryDirectory { directory in
      let (process, service) = try stopWhileItRuns(guest, in: directory)
      service.daemon.send(SIGKILL)
      _ = service.daemon.wait()
      process.send(SIGCONT)
      let outcome = process.wait()
      #expect(outcome.status == 1, "\(outcome)")
      #expect(outcome.errors.contains("nobody serves the guest's memory any more"), "\(outcome)")
      #expect(outcome.output.isEmpty, "\(outcome)")
    }
  }

  @Test("A guest that is let go of runs on, with all of its memory", arguments: guests)
  func letGo(_ guest: String) throws {
    try withTemporaryDirectory { directory in
      let (process, service) = try stopWhileItRuns(guest, in: directory)
      let stopped = try faultline("stop", "1", "--control-socket", service.control)
      #expect(stopped.output == "session 1 is let go of\n", "\(stopped)")
      service.daemon.send(SIGTERM)
      #expect(service.daemon.wait() == 0)
      process.send(SIGCONT)
      let outcome = process.wait()
      #expect(outcome.status == 0, "\(outcome)")
      #expect(outcome.output.contains("guest verified: 65280 pages, 0 wrong"), "\(outcome)")
      #expect(outcome.errors.contains("the service has let go of it"), "\(outcome)")
    }
  }

  @Test("What cannot be is refused in words, and nothing hangs")
  func refusals() throws {
    try withTemporaryDirectory { directory in
      try save("one", in: directory, ["--guest", "process", "--memory", "8M"])
      try save("small", in: directory, ["--guest", "process", "--memory", "4M"])
      let service = try makeService(in: directory)
      let one = directory + "/one.img"
      let wrong: [([String], String)] = [
        ([one, "--handover", directory + "/none.sock"], "cannot connect"),
        ([one, "--handover", one], "cannot connect"),
        ([one, "--handover", service.socket], "unknown_image"),
        ([one, "--handover", service.socket, "--service-image", "none"], "unknown_image"),
        ([one, "--handover", service.socket, "--service-image", "../one"], "malformed"),
        ([one, "--handover", service.socket, "--service-image", "small"], "image_mismatch"),
        ([directory + "/none.img", "--handover", service.socket], "No such file"),
        (
          [one, "--handover", service.socket, "--service-image", "one", "--faults", "minor"],
          "use memfd or hugetlb"
        ),
        (
          [one, "--handover", service.socket, "--service-image", "small", "--clone"],
          "the service's image is not that of"
        ),
        (
          [one, "--handover", service.socket, "--service-image", "none", "--clone"],
          "unknown_image"
        ),
      ]
      for (arguments, words) in wrong {
        let outcome = try CommandProcess(["restore"] + arguments).wait()
        #expect(outcome.status == 1 && outcome.output.isEmpty, "\(outcome)")
        #expect(outcome.errors.contains(words), "\(outcome)")
      }
      #expect(try service.sessions().isEmpty)
    }
  }

  @Test("A service that speaks another protocol is recognized")
  func otherProtocol() throws {
    try withTemporaryDirectory { directory in
      try save("base", in: directory, ["--guest", "process", "--memory", "8M"])
      let service = try Service(in: directory)
      let outcome = try faultline(
        "restore", directory + "/base.img", "--handover", service.socket)
      #expect(outcome.status == 1, "\(outcome)")
      #expect(outcome.errors.contains("one that speaks another protocol"), "\(outcome)")
    }
  }
}
