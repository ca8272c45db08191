// SPDX-License-Identifier: Apache-2.0

import LinuxSystem
import SystemPackage
import TestSupport
import Testing

@Suite("Owned kernel objects")
struct SystemTests {
  @Test("A descriptor passed over a socket is a descriptor of the same file")
  func passDescriptors() throws {
    let pair = try UnixSocket.pair()
    let file = try MemoryFile(name: "passed", length: 4096)
    let mapping = try Mapping(of: file)
    store(42, mapping.range, offset: 0)
    try pair.first.send([1, 2, 3], descriptors: [file.descriptor.rawValue])
    let message = try pair.second.receive(limit: 16)
    #expect(message.bytes == [1, 2, 3])
    let number = try #require(message.descriptors.first)
    #expect(message.descriptors.count == 1)
    let received = OwnedDescriptor(owning: number)
    let second = try Mapping(of: received, length: 4096, sharing: .shared)
    #expect(load(second.range, offset: 0) == 42)
  }

  @Test("More descriptors than there is room for are all closed and refused")
  func tooManyDescriptors() async {
    await #expect(processExitsWith: .success) {
      let pair = try UnixSocket.pair()
      let file = try MemoryFile(name: "passed", length: 4096)
      let numbers = Array(repeating: file.descriptor.rawValue, count: 10)
      try pair.first.send([1], descriptors: numbers)
      do throws(Errno) {
        _ = try pair.second.receive(limit: 16, descriptorLimit: 3)
        preconditionFailure("ten descriptors fitted into three")
      } catch {
        precondition(error == .messageTooLong)
      }
      // By name: the testing library opens and closes descriptors of its own meanwhile.
      precondition(openDescriptors(of: "memfd:passed") == 1)
    }
  }

  @Test("The end of a peer is an empty message")
  func peerGone() throws {
    let pair = try UnixSocket.pair()
    let first = pair.first
    let second = pair.second
    try first.descriptor.close()
    #expect(try second.receive(limit: 16).bytes.isEmpty)
  }

  @Test("A mapping lies at its alignment", arguments: [4096, 2 << 20, 1 << 30])
  func alignment(bytes: Int) throws {
    let mapping = try Mapping(anonymous: 3 << 20, alignment: bytes)
    #expect(Int(mapping.range.start.rawValue) % bytes == 0)
    store(1, mapping.range, offset: mapping.length - 8)
  }

  @Test(
    "A copy through the kernel ends before what cannot be read", arguments: GuardedCopy.Way.allCases
  )
  func guardedCopy(way: GuardedCopy.Way) throws {
    let file = try MemoryFile(name: "short", length: 2 * 4096)
    // A load of the third page raises SIGBUS.
    let mapping = try Mapping(of: file.descriptor, length: 3 * 4096, sharing: .shared)
    let start = mapping.range.start
    for offset in stride(from: 0, to: 2 * 4096, by: 8) {
      store(UInt64(offset), mapping.range, offset: offset)
    }
    for (skipped, readable) in [(0, 8192), (4088, 4104), (8192, 0)] {
      var bytes: [UInt8] = Array(repeating: 0xff, count: 3 * 4096 - skipped)
      let count = try unsafe bytes.withUnsafeMutableBytes { buffer throws(Errno) in
        // SAFETY: the buffer is the array's; the address is within the mapping.
        try unsafe GuardedCopy.read(
          from: start.advanced(by: skipped), into: buffer, by: way)
      }
      #expect(count == readable)
      let words = stride(from: skipped, to: skipped + readable, by: 8)
      let expected = words.flatMap { word in
        (0..<8).map { UInt8(truncatingIfNeeded: word >> (8 * $0)) }
      }
      #expect(Array(bytes.prefix(readable)) == expected)
    }
  }

  @Test(
    "A copy through the kernel to what cannot be written is an error, and no SIGBUS",
    arguments: GuardedCopy.Way.allCases)
  func guardedWrite(way: GuardedCopy.Way) throws {
    let file = try MemoryFile(name: "short", length: 2 * 4096)
    let mapping = try Mapping(of: file.descriptor, length: 3 * 4096, sharing: .shared)
    let start = mapping.range.start
    func write(_ count: Int, at offset: Int) -> Errno? {
      let bytes = [UInt8](repeating: 0x5a, count: count)
      return unsafe bytes.withUnsafeBytes { bytes in
        do throws(Errno) {
          // SAFETY: the bytes are the array's; the address is within the mapping.
          try unsafe GuardedCopy.write(bytes, to: start.advanced(by: offset), by: way)
          return nil
        } catch {
          return error
        }
      }
    }
    #expect(write(0, at: 0) == nil)
    #expect(write(4096, at: 2048) == nil)
    #expect(load(mapping.range, offset: 2040) == 0)
    #expect(load(mapping.range, offset: 2048) == 0x5a5a_5a5a_5a5a_5a5a)
    #expect(load(mapping.range, offset: 6144) == 0)
    for (count, offset) in [(4096, 8192), (8192, 4096), (16, 8184)] {
      #expect(write(count, at: offset) == .badAddress)
    }
  }

  @Test("A thread has its name and can be interrupted")
  func namedThread() throws {
    try KickSignal.install()
    let names = NameBox()
    let thread = try ThreadHandle.start { names.set(currentThreadName()) }
    thread.join()
    #expect(names.get() == "test")
  }

  @Test("A wait ends for the stop sign, and a reset takes it down")
  func stopSign() throws {
    let stop = try EventDescriptor()
    let poller = try Poller()
    try poller.add(stop.descriptor.rawValue, tag: 9)
    #expect(try poller.wait(milliseconds: 0) == nil)
    stop.signal()
    #expect(try poller.wait()?.tag == 9)
    stop.reset()
    #expect(try poller.wait(milliseconds: 0) == nil)
  }

  @Test("An error is the kernel's own", arguments: [0, 100])
  func errors(length: Int) {
    #expect(throws: Errno.invalidArgument) { _ = try MemoryFile(name: "odd", length: length) }
  }
}
