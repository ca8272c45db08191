// SPDX-License-Identifier: Apache-2.0

import Foundation
import GuestMemory
import LinuxSystem
import Pager
import TestSupport
import Testing
import Userfault

@Suite("Threads that are not to be had")
struct ThreadShortageTests {
  private static let root = "/sys/fs/cgroup/pids"
  private static let canLimit =
    Host.hasPrivileges && FileManager.default.fileExists(atPath: root + "/cgroup.procs")

  @Test(
    "A page that has to wait for its source is tried again at a bounded pace, and comes",
    .enabled(if: canLimit, "needs root and the pids controller of cgroups v1"),
    arguments: [false, true])
  func noThread(isPooled: Bool) async {
    await #expect(processExitsWith: .success) { [isPooled] in
      let group = "/sys/fs/cgroup/pids/faultline-test-\(getpid())"
      try FileManager.default.createDirectory(atPath: group, withIntermediateDirectories: false)
      func write(_ text: String, _ name: String) throws {
        try Data(text.utf8).write(to: URL(fileURLWithPath: "\(group)/\(name)"), options: [])
      }
      let pool = isPooled ? try PagerPool(threads: 1, capacity: 1) : nil
      let guest = try ServedMemory(
        MemoryCase.all[0], pages: 4, source: PatternSource(delay: 100), threads: 1,
        pool: pool)
      let gate = ThreadGate()
      let toucher = try ThreadHandle.start {
        gate.wait()
        for block in 0..<4 {
          guard load(guest.range, offset: block * 4096) == guest.source.expected(block: block)
          else { exit(5) }
        }
      }
      try write("\(getpid())", "cgroup.procs")
      let count = try String(contentsOfFile: group + "/pids.current", encoding: .utf8)
      try write(count, "pids.max")
      gate.open()
      Delay.microseconds(200_000)
      let before = processorTime()
      Delay.microseconds(500_000)
      let time = processorTime() - before
      // The crash of a process at its limit would hang: nothing reports it.
      func check(_ holds: Bool, _ code: Int32) { if !holds { exit(code) } }
      check(time < 0.25, 2)
      check(guest.session.statistics.faults < 200, 3)
      check(guest.source.readCount == 0, 4)
      try write("max", "pids.max")
      toucher.join()
      guest.session.release()
      pool?.stop()
      try? Data("\(getpid())".utf8).write(
        to: URL(fileURLWithPath: "/sys/fs/cgroup/pids/cgroup.procs"), options: [])
      unsafe rmdir(group)
    }
  }
}
