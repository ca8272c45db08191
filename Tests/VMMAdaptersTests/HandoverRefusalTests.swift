// SPDX-License-Identifier: Apache-2.0

import Glibc
import HandoverProtocol
import LinuxSystem
import SystemPackage
import TestSupport
import Testing
import Userfault

@testable import VMMAdapters

/// A frame around a text, put together by hand.
func frame(_ text: String) -> [UInt8] {
  let count = text.utf8.count
  return Array("FLHO".utf8)
    + [UInt8(count & 255), UInt8(count >> 8 & 255), UInt8(count >> 16 & 255), UInt8(count >> 24)]
    + Array(text.utf8)
}

/// A message with one good region, some fields of which are others.
private func attach(
  _ region: String = "\"host_address\":65536,\"length\":8192,\"offset\":0", more: String = "",
  descriptors: String = "\"userfaultfd\"", head: String = "\"type\":\"attach\",\"version\":1"
) -> String {
  "{\(head),\"descriptors\":[\(descriptors)],\"regions\":[{\(region)}]\(more)}"
}

private struct BadRequest: Sendable, CustomStringConvertible {
  let description: String
  let bytes: [UInt8]
  let code: HandoverError.Code
  let says: String
  init(_ name: String, _ bytes: [UInt8], _ code: HandoverError.Code, _ says: String) {
    (description, self.bytes, self.code, self.says) = (name, bytes, code, says)
  }
  init(_ name: String, _ text: String, _ code: HandoverError.Code, _ says: String) {
    self.init(name, frame(text), code, says)
  }
}

private let place = "\"host_address\":65536,\"length\":8192"

private let badRequests: [BadRequest] = [
  BadRequest("nothing", [UInt8](), .disconnected, "after 0 bytes"),
  BadRequest("half a header", Array("FLHO".utf8), .disconnected, "after 4 bytes"),
  BadRequest("half a message", Array(frame(attach()).prefix(50)), .disconnected, "after 50"),
  BadRequest("Firecracker", Array("[{\"base".utf8), .malformed, "FLHO"),
  BadRequest("no length", Array("FLHO\0\0\0\0".utf8), .malformed, "empty"),
  BadRequest(
    "a huge length", Array("FLHO".utf8) + [255, 255, 255, 255], .limitExceeded, "4294967295"),
  BadRequest("no JSON", "hello", .malformed, "not JSON"),
  BadRequest("a list", "[]", .malformed, "right type"),
  BadRequest("nested lists", String(repeating: "[", count: 20_000), .malformed, "JSON"),
  BadRequest("another type", attach(head: "\"type\":\"ok\",\"version\":1"), .malformed, "attach"),
  BadRequest("no type", attach(head: "\"version\":1"), .malformed, "\"type\""),
  BadRequest("no version", attach(head: "\"type\":\"attach\""), .malformed, "\"version\""),
  BadRequest(
    "a later version", "{\"type\":\"attach\",\"version\":2}", .unsupportedVersion, "version 2"),
  BadRequest(
    "no region", "{\"type\":\"attach\",\"version\":1,\"descriptors\":[\"userfaultfd\"]}",
    .malformed, "\"regions\""),
  BadRequest("no place", attach("\"length\":8192,\"offset\":0"), .malformed, "host_address"),
  BadRequest("no content", attach(place), .malformed, "region 0"),
  BadRequest(
    "two contents", attach(place + ",\"offset\":0,\"guest_address\":0"), .malformed, "one of"),
  BadRequest(
    "mixed contents",
    attach(
      place + ",\"offset\":0},{\"host_address\":1048576,\"length\":4096,"
        + "\"guest_address\":0"), .invalidRegions, "region 1"),
  BadRequest(
    "a string for a number", attach(place + ",\"offset\":\"0\""), .malformed, "\"offset\""),
  BadRequest(
    "an unknown mode", attach(place + ",\"offset\":0,\"mode\":\"magic\""), .malformed, "\"mode\""),
  BadRequest(
    "minor without memory", attach(place + ",\"offset\":0,\"mode\":\"minor\""), .malformed,
    "memory"),
  BadRequest(
    "memory that did not come", attach(place + ",\"offset\":0,\"memory\":0"), .invalidDescriptor,
    "memory file 0"),
  BadRequest(
    "negative memory", attach(place + ",\"offset\":0,\"memory\":-1"), .invalidDescriptor,
    "memory file -1"),
  BadRequest(
    "no userfaultfd", attach(descriptors: "\"memory\""), .invalidDescriptor, "one userfaultfd"),
  BadRequest(
    "an unknown descriptor", attach(descriptors: "\"kvm\""), .malformed, "descriptors"),
  BadRequest(
    "more descriptors than came", attach(descriptors: "\"userfaultfd\",\"memory\""),
    .invalidDescriptor, "has 2 and 1 came"),
  BadRequest("no descriptors", attach(descriptors: ""), .invalidDescriptor, "has 0 and 1 came"),
  BadRequest("a path for an image", attach(more: ",\"image\":\"../x\""), .malformed, "\"image\""),
  BadRequest("a hidden image", attach(more: ",\"image\":\".x\""), .malformed, "\"image\""),
  BadRequest("an empty image", attach(more: ",\"image\":\"\""), .malformed, "\"image\""),
  BadRequest("a name of two lines", attach(more: ",\"name\":\"a\\nb\""), .malformed, "\"name\""),
  BadRequest(
    "an endless rate", attach(more: ",\"options\":{\"fill_rate\":9223372036854775807}"),
    .malformed, "fill_rate"),
  BadRequest(
    "overlapping regions",
    attach(
      place + ",\"offset\":0},{\"host_address\":69632,\"length\":4096,\"offset\":8192"),
    .invalidRegions, "overlaps region 0 in memory"),
]

/// What the service says of a request, and what the VMM hears of it; `nil` when it is taken.
private func answer(
  _ bytes: [UInt8], descriptors: [CInt]
) throws -> (error: HandoverError, answer: ServiceMessage?)? {
  let pair = try UnixSocket.pair()
  let service = HandoverConnection(pair.first, limits: smallLimits)
  let vmm = pair.second
  if !bytes.isEmpty { try vmm.send(bytes, descriptors: descriptors) }
  // The end of what the VMM sends; it still listens.
  _ = shutdown(vmm.descriptor.rawValue, Int32(SHUT_WR))
  do throws(HandoverError) {
    _ = try service.receive()
    return nil
  } catch {
    var assembler = FrameAssembler()
    assembler.append(try vmm.isReadable ? vmm.receive(limit: 1 << 16).bytes : [])
    return (error, try assembler.next().map { try ServiceMessage(decoding: $0) })
  }
}

@Suite("A request that is not right is answered with the reason")
struct HandoverRefusalTests {
  @Test("Bad requests", arguments: badRequests)
  private func requests(bad: BadRequest) throws {
    let userfaultfd = try Userfaultfd(requiring: .removeEvents)
    let result = try #require(
      try answer(bad.bytes, descriptors: [userfaultfd.descriptor.rawValue]))
    #expect(result.error.code == bad.code)
    #expect(result.error.description.contains(bad.says), "\(result.error)")
    guard case .error(let code, let message, let versions) = result.answer else {
      Issue.record("no answer came")
      return
    }
    #expect(code == bad.code.name && message.contains(bad.says))
    #expect(versions == (bad.code == .unsupportedVersion ? [1] : nil))
  }

  @Test("A good one, with fields that are not known, is taken")
  func good() throws {
    let memory = try NamedMemory.shared.get()
    let text = attach(
      place + ",\"offset\":0,\"colour\":{\"a\":[1]}", more: ",\"future\":true,\"options\":{}")
    let result = try answer(
      frame(text) + [1, 2, 3], descriptors: [memory.userfaultfd.descriptor.rawValue])
    #expect(result == nil)
  }

  @Test("Memory files: their kind, their length, and two regions on one part of them")
  func memoryFiles() throws {
    let memory = try NamedMemory.shared.get()
    let file = try MemoryFile(name: "vm", length: 65536)
    try file.seal(futureWrites: false)
    let stop = try EventDescriptor()
    let numbers = [memory.userfaultfd.descriptor.rawValue, file.descriptor.rawValue]
    let both = "\"userfaultfd\",\"memory\""
    func code(_ region: String, _ descriptors: [CInt]) throws -> HandoverError.Code? {
      try answer(frame(attach(region, descriptors: both)), descriptors: descriptors)?.error.code
    }
    let minor = place + ",\"offset\":0,\"mode\":\"minor\",\"memory\":0"
    #expect(try code(minor, numbers) == nil)
    #expect(try code(minor + ",\"memory_offset\":57344", numbers) == nil)
    #expect(try code(minor + ",\"memory_offset\":61440", numbers) == .invalidRegions)
    #expect(try code(minor + ",\"memory_offset\":100", numbers) == .invalidRegions)
    #expect(try code(minor + ",\"memory_offset\":9223372036854771712", numbers) == .invalidRegions)
    let second = "},{\"host_address\":1048576,\"length\":4096,\"offset\":8192,\"memory\":0"
    #expect(try code(minor + second, numbers) == .invalidRegions)
    #expect(try code(minor + second + ",\"memory_offset\":8192", numbers) == nil)
    #expect(try code(minor, [numbers[0], stop.descriptor.rawValue]) == .invalidDescriptor)
    // Parts that lie far apart would take up address space of the service.
    let long = try MemoryFile(name: "long", length: 8 << 30)
    try long.seal(futureWrites: false)
    let third = second + ",\"mode\":\"minor\",\"memory_offset\":"
    let numbersOfLong = [numbers[0], long.descriptor.rawValue]
    #expect(try code(minor + third + "\(1 << 30)", numbersOfLong) == nil)
    #expect(try code(minor + third + "\(4 << 30)", numbersOfLong) == .limitExceeded)
    #expect(try code(minor, [numbers[1], numbers[0]]) == .invalidDescriptor)
  }

  @Test("What is refused leaves no descriptor open")
  func leavesNothingOpen() async {
    await #expect(processExitsWith: .success) {
      let file = try MemoryFile(name: "leak-check", length: 4096)
      let userfaultfd = try Userfaultfd(requiring: .removeEvents)
      let good = userfaultfd.descriptor.rawValue
      let other = file.descriptor.rawValue
      for bad in badRequests where !bad.bytes.isEmpty {
        for count in [0, 1, 2, 15] {
          let numbers = [good] + Array(repeating: other, count: count)
          _ = try answer(bad.bytes, descriptors: numbers)
          _ = try answer(bad.bytes, descriptors: Array(numbers.reversed()))
        }
      }
      precondition(openDescriptors(of: "leak-check") == 1)
      precondition(openDescriptors(of: "userfaultfd") == 1)
      precondition(openDescriptors(of: "pidfd") == 0)
    }
  }
}
