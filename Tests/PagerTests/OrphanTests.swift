// SPDX-License-Identifier: Apache-2.0

import Foundation
import TestSupport
import Testing

@testable import Pager

@Suite("Memory outlives the process that handed it over")
struct OrphanTests {
  enum Service: CaseIterable { case ownThread, ownThreads, pool }

  @Test("It is served until its own process ends", arguments: Service.allCases)
  func handedOverByAnother(service: Service) throws {
    let guest = try GuestProcess(pages: 512, threads: 2)
    let helper = Process()
    helper.executableURL = URL(fileURLWithPath: "/bin/sleep")
    helper.arguments = ["1000"]
    try launch(helper)
    let pool = service == .pool ? try PagerPool(threads: 1) : nil
    let session = try guest.session(
      PatternSource(), faultThreads: service == .ownThreads ? 2 : 1,
      peer: helper.processIdentifier)
    if let pool { try session.start(in: pool) } else { try session.start() }
    kill(helper.processIdentifier, SIGKILL)
    helper.waitUntilExit()
    // Longer than it takes to look once more.
    Delay.microseconds(1_500_000)
    try #require(!session.hasEnded)
    try guest.go()
    #expect(try guest.wrongWords() == 0)
    #expect(!session.hasEnded)
    guest.kill()
    #expect(Delay.until { session.hasEnded })
    session.release()
  }
}
