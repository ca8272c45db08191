// SPDX-License-Identifier: Apache-2.0

import CTestSupport
import Foundation
import Glibc
import GuestMemory
import LinuxSystem
import MemoryImage
import Pager
import SystemPackage
import TestSupport
import Testing
import Userfault

@testable import VMMAdapters

/// Numbers that follow from a seed (splitmix64): a failure names its seed.
struct SeededGenerator: RandomNumberGenerator {
  private var state: UInt64
  init(seed: UInt64) { state = seed }
  mutating func next() -> UInt64 {
    state &+= 0x9e37_79b9_7f4a_7c15
    var word = state
    word = (word ^ word >> 30) &* 0xbf58_476d_1ce4_e5b9
    word = (word ^ word >> 27) &* 0x94d0_49bb_1331_11eb
    return word ^ word >> 31
  }
}

/// Makes bad messages of good ones.
struct MessageMutator {
  var random: SeededGenerator

  private static let tokens: [String] = [
    "[", "]", "{", "}", "\"", "\\", ",", ":", "null", "true", "0", "-1", "1e999", "1.5", "4096",
    "4095", "2097152", "9223372036854775807", "18446744073709551615", "18446744073709551616",
    "\"size\":", "\"offset\":", "\"page_size\":", "\"memory\":", "\"regions\":[", "\u{0}",
    "\\ud800", "\u{feff}", "FLHO", " ", "\n", "{\"a\":", "[[[[[[[[[[[[[[[[[[[[",
  ]

  /// One to eight changes, few more often than many.
  mutating func mutate(_ message: [UInt8], other: [UInt8]) -> [UInt8] {
    var bytes = message
    for _ in 0..<1 << Int.random(in: 0...3, using: &random) {
      let place = Int.random(in: 0...bytes.count, using: &random)
      let length = min(Int.random(in: 1...12, using: &random), bytes.count - place)
      switch Int.random(in: 0..<8, using: &random) {
      case 0 where place < bytes.count:
        bytes[place] ^= 1 << UInt8.random(in: 0..<8, using: &random)
      case 1 where place < bytes.count: bytes[place] = .random(in: 0...255, using: &random)
      case 2: bytes.removeSubrange(place..<place + length)
      case 3: bytes.insert(contentsOf: bytes[place..<place + length], at: place)
      case 4:
        let token = Self.tokens.randomElement(using: &random) ?? ""
        bytes.insert(contentsOf: Array(token.utf8), at: place)
      case 5:
        let token = Self.tokens.randomElement(using: &random) ?? ""
        bytes.replaceSubrange(place..<place + length, with: Array(token.utf8))
      case 6: bytes = Array(bytes.prefix(place))
      default: bytes = Array(bytes.prefix(place)) + other.suffix(length * 20)
      }
    }
    return bytes
  }
}

/// Descriptors that a hostile peer may send.
private final class Offers: Sendable {
  let memory: NamedMemory
  let file: MemoryFile
  let unsealed: MemoryFile
  let stop: EventDescriptor
  init() throws {
    memory = try NamedMemory.shared.get()
    let file = try MemoryFile(name: "fuzz-offer", length: 1 << 20)
    try file.seal(futureWrites: false)
    unsealed = try MemoryFile(name: "fuzz-offer", length: 1 << 20)
    stop = try EventDescriptor()
    self.file = file
  }

  /// Half the time what a good message has, else whatever there is.
  func some(_ wanted: Int, using random: inout SeededGenerator) -> [CInt] {
    let all = [
      memory.userfaultfd.descriptor.rawValue, file.descriptor.rawValue, stop.descriptor.rawValue,
      unsealed.descriptor.rawValue,
    ]
    if Bool.random(using: &random) { return Array(all.prefix(wanted)) }
    return (0..<Int.random(in: 0...4, using: &random)).map { _ in
      all[Int.random(in: 0..<all.count, using: &random)]
    }
  }

  /// As many as can be sent at once.
  var many: [CInt] { Array(repeating: file.descriptor.rawValue, count: 16) }
}

/// A VMM's end of a connection.
private final class SenderBox {
  private var socket: UnixSocket?
  init(_ socket: consuming UnixSocket) { self.socket = consume socket }
  func close() { socket = nil }

  func send(_ bytes: [UInt8], descriptors: [CInt]) throws {
    switch socket {
    case .some(let socket): try socket.send(bytes, descriptors: descriptors)
    case .none: break
    }
  }

  /// It says no more, and listens.
  func shutDown() {
    switch socket {
    case .some(let socket): _ = shutdown(socket.descriptor.rawValue, CInt(SHUT_WR))
    case .none: break
    }
  }
}

/// What was made of a message: a region count, or -1 when it was refused.
private func receive(firecracker: Bool, on socket: consuming UnixSocket) -> Int {
  do throws(HandoverError) {
    if firecracker {
      let handover = try FirecrackerHandover.receive(on: socket, limits: smallLimits)
      return checkMap(handover.regions)
    }
    let offer = try fuzzOffer.get()
    let request = try HandoverConnection(socket, limits: smallLimits).receive {
      (_) throws(HandoverError) in offer
    }
    return checkMap(request.regions, request.memoryFiles)
  } catch {
    precondition(error.code != .timedOut, "a message that ended was waited for")
    precondition(!error.description.isEmpty)
    return -1
  }
}

/// What a VMM gets that wants to be a clone: one for all rounds.
private let fuzzOffer = Result { () throws(HandoverError) in
  try makeOffer(imageRegions([3, 512, 1, 1020]))
}

/// What is mapped lies inside of the image, and is what was handed over.
private func checkMap(
  _ regions: [HandedRegion], _ memoryFiles: [HandedMemoryFile?] = []
) -> Int {
  let image = imageRegions([3, 512, 1, 1020])
  guard let ranges = try? ContentMap.ranges(of: regions, in: image) else { return regions.count }
  for range in ranges {
    precondition(range.blocks.upperBound <= image[range.imageRegion].blockCount)
    precondition(range.pageSize.divides(range.host.length))
    // One that is filled through its memory file has it, and a clone its cache.
    do throws(Errno) {
      let caches = (try? fuzzOffer.get().caches) ?? []
      _ = try range.makePagedRegion(memoryFiles: memoryFiles, caches: caches)
    } catch {
      preconditionFailure("no region can be made: \(error)")
    }
  }
  let length = ranges.reduce(0) { $0 + $1.host.length }
  precondition(length == regions.reduce(0) { $0 + $1.host.length })
  return regions.count
}

private let firecrackerSeeds = [
  "[" + FakeFirecracker.object(address: 1 << 30, size: 8192, offset: 0) + "]",
  "[" + FakeFirecracker.object(address: 1 << 30, size: 12288, offset: 0, naming: .none) + ","
    + FakeFirecracker.object(address: 1 << 31, size: 1535 * 4096, offset: 12288, naming: .kib)
    + "]",
  "["
    + FakeFirecracker.object(address: 2 << 20, size: 2 << 20, offset: 0, pageSize: 2 << 20)
    + "]\n",
].map { Array($0.utf8) }

private let handoverSeeds = [
  frame(
    #"{"type":"attach","version":1,"descriptors":["userfaultfd"],"regions":[{"#
      + #""host_address":65536,"length":8192,"guest_address":0}]}"#),
  frame(
    #"{"type":"attach","version":1,"name":"vm","image":"a.b","descriptors":["userfaultfd","#
      + #""memory"],"regions":[{"host_address":65536,"length":8192,"offset":0,"mode":"minor","#
      + #""memory":0,"memory_offset":4096},{"host_address":1048576,"length":4096,"#
      + #""offset":8192}],"options":{"record":true,"fill_rate":1000}}"#),
]

/// A clone's: `open`, and the `attach` that follows it.
private let cloneSeeds = [
  frame(#"{"type":"open","version":1,"name":"vm","image":"a.b","page_size":4096}"#),
  frame(
    #"{"type":"attach","version":1,"descriptors":["userfaultfd"],"regions":[{"#
      + #""host_address":65536,"length":12288,"guest_address":0,"mode":"clone","memory":0},{"#
      + #""host_address":1048576,"length":4096,"guest_address":136327168,"mode":"clone","#
      + #""memory":2}]}"#),
]

/// The frame with a length that fits, so that the JSON is looked at.
private func reframed(_ message: [UInt8]) -> [UInt8] {
  guard message.count > 8 else { return message }
  return Array(frame(String(repeating: "x", count: message.count - 8)).prefix(8))
    + message.dropFirst(8)
}

/// Bytes of this process that are in memory.
private func residentBytes() -> Int {
  let text = (try? String(contentsOfFile: "/proc/self/statm", encoding: .utf8)) ?? ""
  return (text.split(separator: " ").dropFirst().first.flatMap { Int($0) } ?? 0) * 4096
}

/// Sends mutated messages in pieces, with descriptors on some of the pieces.
private func fuzz(firecracker: Bool, seed: UInt64, rounds: Int) throws -> (
  taken: Int, clones: Int, slowest: UInt64
) {
  var mutator = MessageMutator(random: SeededGenerator(seed: seed))
  let seeds = firecracker ? firecrackerSeeds : handoverSeeds + [cloneSeeds.flatMap { $0 }]
  let offers = try Offers()
  var (taken, clones, slowest) = (0, 0, UInt64(0))
  for round in 0..<rounds {
    let base = seeds[round % seeds.count]
    var message = base
    let isClone = !firecracker && round % seeds.count == 2
    if round % 16 != 0, isClone {
      var parts = cloneSeeds
      let part = Int.random(in: 0...1, using: &mutator.random)
      parts[part] = mutator.mutate(parts[part], other: cloneSeeds[1 - part])
      if round % 4 != 1 { parts[part] = reframed(parts[part]) }
      message = parts.flatMap { $0 }
    } else if round % 16 != 0 {
      message = mutator.mutate(base, other: (firecracker ? handoverSeeds : firecrackerSeeds)[0])
      if !firecracker, round % 4 != 1 { message = reframed(message) }
    }
    let pair = try UnixSocket.pair()
    let sender = SenderBox(pair.first)
    var rest = message[...]
    while !rest.isEmpty {
      let count = Int.random(in: 1...rest.count, using: &mutator.random)
      let first = rest.count == message.count
      let wanted = !firecracker && round % seeds.count == 1 ? 2 : 1
      let more = Int.random(in: 0..<40, using: &mutator.random) == 0
      try sender.send(
        Array(rest.prefix(count)),
        descriptors: first ? offers.some(wanted, using: &mutator.random) : more ? offers.many : [])
      rest = rest.dropFirst(count)
    }
    // Who opens an image listens for the answer.
    if isClone { sender.shutDown() } else { sender.close() }
    let start = MonotonicClock.nanoseconds
    if receive(firecracker: firecracker, on: pair.second) >= 0 {
      taken += 1
      if isClone { clones += 1 }
    }
    slowest = max(slowest, MonotonicClock.nanoseconds - start)
    sender.close()
  }
  return (taken, clones, slowest)
}

@Suite("Hostile peers")
struct FuzzTests {
  @Test("Mutated hand-overs crash nothing, cost little, and leave nothing behind")
  func mutations() async {
    await #expect(processExitsWith: .success) {
      for firecracker in [true, false] {
        _ = try fuzz(firecracker: firecracker, seed: 0, rounds: 200)
        let before = residentBytes()
        for seed in UInt64(1)...4 {
          let result = try fuzz(firecracker: firecracker, seed: seed, rounds: 1500)
          // Some must pass, or nothing but the first check is tested.
          precondition(result.taken > 20, "seed \(seed): only \(result.taken) taken")
          precondition(firecracker || result.clones > 5, "seed \(seed): no clone was taken")
          precondition(result.slowest < 20_000_000_000, "seed \(seed): \(result.slowest) ns")
          for (name, kept) in [("fuzz-offer", 0), ("userfaultfd", 1), ("pidfd", 0)] {
            precondition(openDescriptors(of: name) == kept, "seed \(seed): \(name) is open")
          }
        }
        precondition(residentBytes() - before < 64 << 20, "memory grows")
      }
    }
  }

  @Test("More descriptors than a message may carry are all closed", arguments: [17, 100, 253])
  func manyDescriptors(count: Int) throws {
    let file = try MemoryFile(name: "many-\(count)", length: 4096)
    for firecracker in [true, false] {
      let pair = try UnixSocket.pair()
      let seed = firecracker ? firecrackerSeeds[0] : handoverSeeds[0]
      let sent = unsafe seed.withUnsafeBytes { bytes in
        unsafe ctest_send_descriptor_copies(
          pair.first.descriptor.rawValue, bytes.baseAddress, bytes.count,
          file.descriptor.rawValue, CInt(count))
      }
      #expect(sent == seed.count)
      #expect(receive(firecracker: firecracker, on: pair.second) == -1)
      #expect(openDescriptors(of: "many-\(count)") == 1)
    }
  }

  @Test("With no room for them in this process they are refused, and none is kept")
  func noRoom() async {
    await #expect(processExitsWith: .success) {
      let file = try MemoryFile(name: "no-room", length: 4096)
      for firecracker in [true, false] {
        let pair = try UnixSocket.pair()
        try pair.first.send(
          firecracker ? firecrackerSeeds[0] : handoverSeeds[0],
          descriptors: Array(repeating: file.descriptor.rawValue, count: 8))
        // MSG_CTRUNC: the kernel installs three and drops the others.
        let next = try file.descriptor.duplicate().rawValue
        let openFiles = CInt(7)  // RLIMIT_NOFILE, an enumeration in C
        var limit = rlimit()
        _ = unsafe getrlimit(openFiles, &limit)
        let usual = limit.rlim_cur
        limit.rlim_cur = rlim_t(next + 3)
        precondition(unsafe setrlimit(openFiles, &limit) == 0)
        let taken = receive(firecracker: firecracker, on: pair.second)
        limit.rlim_cur = usual
        precondition(unsafe setrlimit(openFiles, &limit) == 0)
        precondition(taken == -1)
        precondition(openDescriptors(of: "memfd:no-room") == 1)
      }
    }
  }
}
