// SPDX-License-Identifier: Apache-2.0

import Foundation
import Glibc
import LinuxSystem
import SystemPackage
import TestSupport
import Testing
import Userfault

@testable import VMMAdapters

/// A message that is refused, whatever descriptor comes with it.
private struct BadMessage: Sendable, CustomStringConvertible {
  let description: String
  let text: String
  let code: HandoverError.Code
  /// What the reason has to say.
  let says: String
  init(_ name: String, _ text: String, _ code: HandoverError.Code, _ says: String) {
    (description, self.text, self.code, self.says) = (name, text, code, says)
  }
}

private let good = FakeFirecracker.object(address: 0x1000_0000, size: 8192, offset: 0)

private func object(_ address: UInt64, _ size: Int, _ offset: Int, _ page: Int = 4096) -> String {
  FakeFirecracker.object(address: address, size: size, offset: offset, pageSize: page)
}

private let badMessages: [BadMessage] = [
  BadMessage("nothing", "", .disconnected, "after 0 bytes"),
  BadMessage("cut JSON", "[\(good),{\"base_", .disconnected, "before its list was complete"),
  BadMessage("an object", good, .malformed, "JSON array"),
  BadMessage("another protocol", "GET / HTTP/1.1\r\n\r\n", .malformed, "JSON array"),
  BadMessage("binary", "\u{0}\u{1}\u{2}", .malformed, "JSON array"),
  BadMessage("brackets only", String(repeating: "[", count: 5000), .malformed, "nested"),
  BadMessage("no regions", "[]", .invalidRegions, "no regions"),
  BadMessage("numbers", "[1, 2]", .malformed, "right type"),
  BadMessage("broken JSON", "[{\"size\":}]", .malformed, "not JSON"),
  BadMessage("no address", "[{\"size\":4096,\"offset\":0}]", .malformed, "base_host_virt_addr"),
  BadMessage(
    "a string for a size", "[{\"base_host_virt_addr\":4096,\"size\":\"4096\",\"offset\":0}]",
    .malformed, "\"size\""),
  BadMessage(
    "a negative size", "[{\"base_host_virt_addr\":4096,\"size\":-4096,\"offset\":0}]", .malformed,
    "number"),
  BadMessage(
    "a fraction", "[{\"base_host_virt_addr\":4096,\"size\":4096.5,\"offset\":0}]", .malformed,
    "number"),
  BadMessage(
    "more than 64 bits",
    "[{\"base_host_virt_addr\":36893488147419103232,\"size\":4096,\"offset\":0}]", .malformed,
    "number"),
  BadMessage(
    "null", "[{\"base_host_virt_addr\":null,\"size\":4096,\"offset\":0}]", .malformed,
    "base_host_virt_addr"),
  BadMessage("trailing bytes", "[\(good)]x", .malformed, "1 more bytes"),
  BadMessage("a second message", "[\(good)][\(good)]", .malformed, "more bytes"),
  BadMessage("an empty region", "[\(object(4096, 0, 0))]", .invalidRegions, "empty"),
  BadMessage("an odd size", "[\(object(4096, 5000, 0))]", .invalidRegions, "length of 5000"),
  BadMessage("an odd address", "[\(object(4097, 4096, 0))]", .invalidRegions, "address"),
  BadMessage("an odd offset", "[\(object(4096, 4096, 100))]", .invalidRegions, "offset 100"),
  BadMessage("8 KiB pages", "[\(object(8192, 8192, 0, 8192))]", .invalidRegions, "8192"),
  BadMessage("page size in KiB", "[\(object(8192, 8192, 0, 4))]", .invalidRegions, "page size"),
  BadMessage(
    "two page sizes",
    "[{\"base_host_virt_addr\":4096,\"size\":4096,\"offset\":0,\"page_size\":4096,"
      + "\"page_size_kib\":4}]", .malformed, "page_size_kib"),
  BadMessage(
    "half a huge page", "[\(object(2 << 20, 1 << 20, 0, 2 << 20))]", .invalidRegions, "length"),
  BadMessage(
    "the end of the address space", "[\(object(.max - 4095, 8192, 0))]", .invalidRegions,
    "address space"),
  BadMessage(
    "a kernel address", "[\(object(0xffff_8000_0000_0000, 4096, 0))]", .invalidRegions,
    "address space"),
  BadMessage(
    "the largest size", "[\(object(4096, Int.max & ~4095, 0))]", .invalidRegions, "address space"),
  BadMessage(
    "the largest offset", "[\(object(4096, 4096, Int.max & ~4095))]", .invalidRegions,
    "image can hold"),
  BadMessage(
    "overlapping memory", "[\(object(4096, 8192, 0)),\(object(8192, 4096, 8192))]",
    .invalidRegions, "overlaps region 0 in memory"),
  BadMessage(
    "overlapping offsets", "[\(object(4096, 8192, 4096)),\(object(65536, 8192, 0))]",
    .invalidRegions, "overlaps region 0 in the content"),
  BadMessage(
    "the same twice", "[\(good),\(good)]", .invalidRegions, "region 1: it overlaps region 0"),
  BadMessage(
    "too many regions",
    "[" + (0..<101).map { object(UInt64($0 + 1) << 20, 4096, $0 << 12) }.joined(separator: ",")
      + "]", .limitExceeded, "101 regions"),
  BadMessage(
    "a message without an end", "[\"" + String(repeating: "x", count: 40_000), .limitExceeded,
    "32768 bytes"),
]

@Suite("A hand-over that is not right is refused, and says why")
struct FirecrackerRefusalTests {
  @Test("Bad messages", arguments: badMessages)
  private func messages(bad: BadMessage) throws {
    let userfaultfd = try Userfaultfd(requiring: .removeEvents)
    let error = try #require(
      try refusal(of: Array(bad.text.utf8), descriptors: [userfaultfd.descriptor.rawValue]))
    #expect(error.code == bad.code)
    #expect(error.description.contains(bad.says), "\(error)")
    #expect(error.peer?.processID == getpid())
  }

  @Test("Unknown fields, white space and any order are taken")
  func tolerance() throws {
    let memory = try NamedMemory.shared.get()
    let text = """
       [ { "gpa_start": 7, "offset": 0, "new": {"a": [1, "]}\\"", null]}, "size": 8192,
          "base_host_virt_addr": 268435456 } ]\r\n\t 
      """
    let error = try refusal(
      of: Array(text.utf8), descriptors: [memory.userfaultfd.descriptor.rawValue])
    #expect(error == nil)
  }

  @Test("No descriptor, ten of them, two of them, and the wrong kind")
  func descriptors() throws {
    let userfaultfd = try Userfaultfd(requiring: .removeEvents)
    let number = userfaultfd.descriptor.rawValue
    let message = Array("[\(good)]".utf8)
    let none = try refusal(of: message, descriptors: [])
    #expect(none?.code == .invalidDescriptor && none?.description.contains("no descriptor") == true)
    for count in [2, 10, 16] {
      let error = try refusal(of: message, descriptors: Array(repeating: number, count: count))
      #expect(error?.code == .invalidDescriptor)
    }
    let file = try MemoryFile(name: "not-it", length: 4096)
    let wrong = try refusal(of: message, descriptors: [file.descriptor.rawValue])
    #expect(wrong?.code == .invalidDescriptor)
    #expect(wrong?.description.contains("memfd:not-it") == true)
  }

  @Test("A peer that says nothing, or not enough, is given up on in time")
  func timeout() throws {
    for text in ["", "[\(good)"] {
      let pair = try UnixSocket.pair()
      if !text.isEmpty { try pair.first.send(Array(text.utf8)) }
      let start = MonotonicClock.nanoseconds
      let second = pair.second
      let error = #expect(throws: HandoverError.self) {
        _ = try FirecrackerHandover.receive(
          on: second, limits: HandoverLimits(timeoutMilliseconds: 50))
      }
      #expect(error?.code == .timedOut)
      #expect(MonotonicClock.nanoseconds - start < 60_000_000_000)
      try pair.first.send([0])
    }
  }

  @Test("A peer that sends a byte now and then does not get more time for it")
  func drip() throws {
    let pair = try UnixSocket.pair()
    let sender = SocketBox(pair.first)
    let second = pair.second
    let thread = try ThreadHandle.start {
      for byte in Array("[\(good)".utf8).prefix(60) {
        guard (try? sender.socket.send([byte])) != nil else { return }
        Delay.microseconds(5000)
      }
    }
    let error = #expect(throws: HandoverError.self) {
      _ = try FirecrackerHandover.receive(
        on: second, limits: HandoverLimits(timeoutMilliseconds: 100))
    }
    #expect(error?.code == .timedOut)
    thread.join()
  }

  @Test("The stop sign ends the wait")
  func stopSign() throws {
    let pair = try UnixSocket.pair()
    let second = pair.second
    let stop = try EventDescriptor()
    stop.signal()
    let number = stop.descriptor.rawValue
    let error = #expect(throws: HandoverError.self) {
      _ = try FirecrackerHandover.receive(on: second, stopSign: number)
    }
    #expect(error?.code == .cancelled)
  }

  @Test("A user who is not allowed is refused before anything is read")
  func users() throws {
    let pair = try UnixSocket.pair()
    let second = pair.second
    let me = geteuid()
    let error = #expect(throws: HandoverError.self) {
      _ = try FirecrackerHandover.receive(on: second, allowedUsers: [me &+ 1])
    }
    #expect(error?.code == .notAllowed)
    #expect(error?.description.contains("uid \(me)") == true)
    let firecracker = try FakeFirecracker(regions: 1, pages: 4)
    try firecracker.send(on: pair.first)
    let handover = try FirecrackerHandover.receive(on: second, allowedUsers: [me])
    #expect(handover.regions.count == 1)
  }

  @Test("What is refused leaves no descriptor open")
  func leavesNothingOpen() async {
    await #expect(processExitsWith: .success) {
      let file = try MemoryFile(name: "leak-check", length: 4096)
      let number = file.descriptor.rawValue
      // Whatever started the tests may have left some.
      let sockets = openDescriptors(of: "socket:")
      for bad in badMessages where !bad.text.isEmpty {
        for count in [1, 2, 10, 16] {
          _ = try refusal(
            of: Array(bad.text.utf8), descriptors: Array(repeating: number, count: count))
        }
      }
      precondition(openDescriptors(of: "leak-check") == 1)
      precondition(openDescriptors(of: "socket:") == sockets)
      precondition(openDescriptors(of: "userfaultfd") == 0)
    }
  }
}
