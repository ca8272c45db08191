// SPDX-License-Identifier: Apache-2.0

import Foundation
import Glibc
import HandoverClient
import HandoverProtocol
import LinuxSystem
import MemoryImage
import Pager
import Synchronization
import SystemPackage
import TestSupport
import Testing
import Userfault

@testable import VMMAdapters

/// A service with one image that serves whoever comes, one after the other.
final class TestService: Sendable {
  private let thread: ThreadHandle

  /// Answers `count` VMMs.
  init(
    _ path: String, count: Int = 1,
    _ serve: @escaping @Sendable (HandoverConnection, Int) throws -> Void
  ) throws {
    let listener = try UnixListener(path: FilePath(path))
    let box = ListenerBox(listener)
    thread = try ThreadHandle.start {
      for number in 0..<count {
        // What the service refuses is the client's to see.
        try? serve(HandoverConnection(try box.listener.accept()), number)
      }
    }
  }

  func join() { thread.join() }

  private final class ListenerBox: Sendable {
    let listener: UnixListener
    init(_ listener: consuming UnixListener) { self.listener = listener }
  }
}

@Suite("The hand-over protocol")
struct HandoverTests {
  @Test("A VMM is served from the image until it closes", arguments: [true, false])
  func serves(byGuestAddress: Bool) throws {
    try withTemporaryDirectory { directory in
      let vmm = try FakeFirecracker(regions: 2, pages: 32)
      let image = try makePatternImage(directory + "/image", regions: imageRegions([32, 32]))
      let seen = Mutex<[String]>([])
      let service = try TestService(directory + "/socket") { connection, _ in
        let request = try connection.receive()
        let ranges = try ContentMap.ranges(of: request.regions, in: image.regions)
        seen.withLock {
          $0 = [request.name ?? "", request.image ?? "", "\(request.fillRate ?? -1)"]
          $0.append("\(request.record == true) \(request.peer.processID == getpid())")
        }
        let session = try makeSession(
          ranges, image, userfaultfd: request.userfaultfd, process: request.process)
        try session.start()
        connection.accept(session: "s1")
        connection.push(.filled)
        while !connection.hasClosed() { Delay.microseconds(500) }
        session.release()
      }
      var offset: UInt64 = 0
      var regions: [AttachMessage.Region] = []
      for (number, range) in vmm.ranges.enumerated() {
        regions.append(
          AttachMessage.Region(
            hostAddress: range.start.rawValue, length: UInt64(range.length),
            guestAddress: byGuestAddress ? image.regions[number].guestAddress.rawValue : nil,
            offset: byGuestAddress ? nil : offset))
        offset += UInt64(range.length)
      }
      do {
        let client = try HandoverClient(
          attachingTo: FilePath(directory + "/socket"), regions: regions,
          userfaultfd: vmm.userfaultfd, name: "vm 1", image: "base",
          options: .init(record: true, fillRate: 0))
        #expect(client.session == "s1")
        #expect(try vmm.wrongBlocks() == 0)
        #expect(try client.nextStatus(waitingMilliseconds: 60_000) == .filled)
        #expect(try client.nextStatus() == nil)
      }
      service.join()
      #expect(seen.withLock { $0 } == ["vm 1", "base", "0", "true true"])
    }
  }

  @Test("A service that goes away, or says no, is told from one that is not there")
  func clientErrors() throws {
    try withTemporaryDirectory { directory in
      let vmm = try FakeFirecracker(regions: 1, pages: 4)
      let path = FilePath(directory + "/socket")
      let region = AttachMessage.Region(
        hostAddress: vmm.ranges[0].start.rawValue, length: 16384, offset: 0)
      func attach(timeout: Int = 60_000) throws(HandoverClientError) -> HandoverClient {
        try HandoverClient(
          attachingTo: path, regions: [region], userfaultfd: vmm.userfaultfd,
          timeoutMilliseconds: timeout)
      }
      func failure(timeout: Int = 60_000) -> HandoverClientError? {
        do throws(HandoverClientError) {
          _ = try attach(timeout: timeout)
          return nil
        } catch { return error }
      }
      #expect(failure()?.code == .unreachable)
      let service = try TestService(directory + "/socket", count: 4) { connection, number in
        switch number {
        case 0: connection.refuse(HandoverError(.busy, "there are 3 sessions"))
        case 1: while !connection.hasClosed() { Delay.microseconds(1000) }
        case 2: _ = try connection.receive()
        default:
          _ = try connection.receive()
          connection.accept(session: "x")
        }
      }
      let refused = failure()
      #expect(refused?.code == .refused && refused?.serviceCode == "busy")
      #expect(refused?.description.contains("there are 3 sessions") == true)
      #expect(failure(timeout: 200)?.code == .timedOut)
      #expect(failure()?.code == .closed)
      let client = try attach()
      service.join()
      let gone = #expect(throws: HandoverClientError.self) {
        _ = try client.nextStatus(waitingMilliseconds: 60_000)
      }
      #expect(gone?.code == .closed)
    }
  }

  @Test("A VMM that does not read loses messages, is told how many, and holds nobody up")
  func slowReader() throws {
    let pair = try UnixSocket.pair()
    let connection = HandoverConnection(pair.first)
    let vmm = pair.second
    var lost = 0
    let text = String(repeating: "x", count: 1000)
    while lost < 10 {
      if !connection.push(.poisoned(hostAddress: 4096, length: 4096, message: text)) { lost += 1 }
    }
    var assembler = FrameAssembler()
    var statuses: [HandoverStatus] = []
    func drain() throws {
      while try vmm.isReadable {
        assembler.append(try vmm.receive(limit: 1 << 16).bytes)
        while let payload = try assembler.next() {
          guard case .status(let status) = try ServiceMessage(decoding: payload) else { continue }
          statuses.append(status)
        }
      }
    }
    try drain()
    #expect(connection.push(.ended("bye")))
    try drain()
    #expect(statuses.last == HandoverStatus(event: "ended", message: "bye", dropped: 10))
    #expect(statuses.dropLast().allSatisfy { $0.dropped == 0 && $0.message == text })
    #expect(assembler.pendingBytes == 0)
  }

  @Test("Whatever a VMM says after its request is dropped, and its end is seen")
  func end() async {
    await #expect(processExitsWith: .success) {
      let pair = try UnixSocket.pair()
      let connection = HandoverConnection(pair.first)
      let file = try MemoryFile(name: "unwanted", length: 4096)
      precondition(!connection.hasClosed())
      let vmm = pair.second
      try vmm.send([1, 2, 3], descriptors: Array(repeating: file.descriptor.rawValue, count: 3))
      precondition(!connection.hasClosed())
      precondition(openDescriptors(of: "memfd:unwanted") == 1)
      try vmm.descriptor.close()
      precondition(connection.hasClosed())
      precondition(!connection.push(.filled))
    }
  }

  @Test("The messages in docs/handover.md are what is understood")
  func document() throws {
    let path = URL(fileURLWithPath: #filePath).deletingLastPathComponent()
      .appendingPathComponent("../../docs/handover.md")
    let text = try String(contentsOf: path, encoding: .utf8)
    let blocks = text.components(separatedBy: "```json\n").dropFirst().compactMap {
      $0.components(separatedBy: "```").first
    }
    #expect(blocks.count == 4)
    let attach = try AttachMessage(decoding: Array(blocks[0].utf8))
    #expect(attach.regions[0].mode == .minor && attach.options?.record == true)
    let lines = blocks[1].split(separator: "\n", maxSplits: 1)
    #expect(
      try VMMMessage(decoding: Array(lines[0].utf8))
        == .open(OpenMessage(name: "vm-17", image: "debian-12", pageSize: 4096)))
    let region = ImageMessage.Region(
      guestAddress: 0, offset: 0, length: 64 << 20, name: "ram", memory: 0)
    #expect(
      try ServiceMessage(decoding: Array(lines[1].utf8))
        == .image(ImageMessage(pageSize: 4096, regions: [region])))
    let answers = try blocks[2].split(separator: "\n").map {
      try ServiceMessage(decoding: Array($0.utf8))
    }
    #expect(answers.first == .ok(session: "7") && answers.count == 2)
    guard case .status(let status) = try ServiceMessage(decoding: Array(blocks[3].utf8)) else {
      Issue.record("not a status")
      return
    }
    #expect(status.event == "poisoned" && status.length == 4096)
  }
}
