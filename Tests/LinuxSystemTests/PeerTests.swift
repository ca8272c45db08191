// SPDX-License-Identifier: Apache-2.0

import Glibc
import LinuxSystem
import SystemPackage
import TestSupport
import Testing

@Suite("The other end of a socket")
struct PeerTests {
  /// A time on the monotonic clock.
  func soon(_ milliseconds: UInt64) -> UInt64 {
    MonotonicClock.nanoseconds + milliseconds * 1_000_000
  }

  @Test("Its process, user and group are the kernel's word")
  func credentials() throws {
    let pair = try UnixSocket.pair()
    let peer = try pair.first.peer
    #expect(peer == PeerCredentials(processID: getpid(), userID: geteuid(), groupID: getegid()))
  }

  @Test("Its process has a pidfd, which says nothing while it lives")
  func process() throws {
    let pair = try UnixSocket.pair()
    let process = try pair.first.openPeerProcess()
    #expect(try process.kernelName.contains("pidfd"))
    #expect(try PollSet(process.rawValue, -1).wait(milliseconds: 0) == nil)
  }

  @Test("A receive ends at its deadline, for the stop sign, and for the end of the peer")
  func deadline() throws {
    let pair = try UnixSocket.pair()
    var list = DescriptorList()
    let start = MonotonicClock.nanoseconds
    #expect(throws: Errno.timedOut) {
      _ = try pair.first.receive(
        limit: 16, into: &list, descriptorLimit: 1, before: start + 20_000_000)
    }
    #expect(MonotonicClock.nanoseconds - start >= 20_000_000)
    let stop = try EventDescriptor()
    stop.signal()
    #expect(throws: Errno.canceled) {
      _ = try pair.first.receive(
        limit: 16, into: &list, descriptorLimit: 1, before: soon(10_000),
        stopSign: stop.descriptor.rawValue)
    }
    let first = pair.first
    let second = pair.second
    try second.descriptor.close()
    let rest = try first.receive(
      limit: 16, into: &list, descriptorLimit: 1, before: soon(10_000))
    #expect(rest.isEmpty)
  }

  @Test("Descriptors of several messages add up to the limit, and all are closed")
  func descriptorList() async {
    await #expect(processExitsWith: .success) {
      let pair = try UnixSocket.pair()
      let file = try MemoryFile(name: "listed", length: 4096)
      let number = file.descriptor.rawValue
      let later = MonotonicClock.nanoseconds + 10_000_000_000
      try pair.first.send([1], descriptors: [number, number])
      try pair.first.send([2], descriptors: [number, number])
      do {
        var list = DescriptorList()
        let bytes = try pair.second.receive(
          limit: 16, into: &list, descriptorLimit: 3, before: later)
        precondition(bytes == [1] && list.count == 2)
        do throws(Errno) {
          _ = try pair.second.receive(limit: 16, into: &list, descriptorLimit: 3, before: later)
          preconditionFailure("four descriptors fitted into three")
        } catch {
          precondition(error == .messageTooLong)
        }
        let taken = list.takeFirst()
        precondition(taken != nil && list.count == 1)
        precondition(openDescriptors(of: "memfd:listed") == 3)
      }
      precondition(openDescriptors(of: "memfd:listed") == 1)
    }
  }

  @Test("A full socket takes nothing and does not make the sender wait")
  func fullSocket() throws {
    let pair = try UnixSocket.pair()
    let piece = [UInt8](repeating: 7, count: 1 << 16)
    var sent = 0
    while case let count = try pair.first.sendWithoutWaiting(piece), count > 0 { sent += count }
    #expect(sent > 0)
    #expect(try pair.second.receive(limit: 1 << 16).bytes.count > 0)
    #expect(try pair.first.sendWithoutWaiting([1]) == 1)
  }
}
