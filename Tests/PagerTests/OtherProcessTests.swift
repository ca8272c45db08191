// SPDX-License-Identifier: Apache-2.0

import LinuxSystem
import TestSupport
import Testing
import Userfault

@testable import Pager

@Suite("The guest is another process")
struct OtherProcessTests {
  @Test(
    "A descriptor that was handed over serves the process that made it",
    arguments: [FaultAround.off, .adaptive])
  func serves(faultAround: FaultAround) throws {
    let guest = try GuestProcess(pages: 512, threads: 4)
    let session = try guest.session(PatternSource(), faultAround: faultAround)
    try session.start()
    try guest.go()
    #expect(try guest.wrongWords() == 0)
    session.stop()
    let counts = session.statistics
    #expect(counts.copiedPages + counts.zeroPages == 512)
    if faultAround == .off { #expect(counts.faults >= 512) }
  }

  @Test(
    "A guest killed in the middle of its faults ends the session, with or without a pidfd",
    arguments: [true, false])
  func killedInMidFault(watches: Bool) throws {
    for round in 0..<8 {
      let guest = try GuestProcess(pages: 4096, threads: 4)
      let session = try guest.session(PatternSource(delay: 100), watchesProcess: watches)
      try session.start()
      try guest.go()
      #expect(Delay.until { session.statistics.faults > UInt64(round * 40) })
      guest.kill()
      if watches {
        #expect(Delay.until { session.hasEnded })
      }
      // Whatever the threads were doing, they come to an end.
      session.release()
      #expect(session.failures.isEmpty)
    }
  }

  @Test("A handler that dies with faults in hand is replaced without a wrong word")
  func replacedHandler() throws {
    let guest = try GuestProcess(pages: 2048, threads: 4)
    try guest.go()
    for _ in 0..<20 {
      let first = try guest.session(PatternSource())
      try first.start()
      Delay.microseconds(1500)
      first.stop()
      // Faults that were read and never answered.
      _ = Delay.until(seconds: 0.01) { first.dropOneFault() }
    }
    let last = try guest.session(PatternSource())
    try last.start()
    #expect(try guest.wrongWords() == 0)
    last.stop()
  }

  @Test("Killed guests leave no descriptor and no thread behind")
  func leavesNothingBehind() async {
    await #expect(processExitsWith: .success) {
      func cycle() throws {
        let guest = try GuestProcess(pages: 1024, threads: 2)
        let session = try guest.session(PatternSource(delay: 50))
        try session.start()
        try guest.go()
        Delay.microseconds(3000)
        guest.kill()
        session.release()
      }
      for _ in 0..<3 { try cycle() }
      let before = openDescriptorCount()
      for _ in 0..<10 { try cycle() }
      precondition(Delay.until { openDescriptorCount() <= before }, "descriptors leak")
    }
  }
}
