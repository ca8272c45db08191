// SPDX-License-Identifier: Apache-2.0

import Foundation
import Glibc
import HandoverClient
import HandoverProtocol
import LinuxSystem
import SystemPackage
import TestSupport
import Testing
import Userfault

/// Whether the other side has closed, or reset.
private func isClosed(_ socket: borrowing UnixSocket) -> Bool {
  guard (try? socket.isReadable) == true else { return false }
  return (try? socket.receive(limit: 4096).bytes.isEmpty) ?? true
}

/// A connection that a test can keep in an array.
private final class Client: Sendable {
  let socket: UnixSocket
  init(_ path: String) throws { socket = try UnixSocket(connectingTo: FilePath(path)) }
}

@Suite("Clients that do not say what they want hold up nobody")
struct SilentClientTests {
  /// What they do.
  enum Kind: String, CaseIterable { case silence, trickle, descriptors }

  @Test(
    "A VM is attached while 300 others wait", arguments: Kind.allCases,
    ["firecracker", "faultline"])
  func attaches(kind: Kind, handover: String) throws {
    try withTemporaryDirectory { directory in
      let service = try Service(in: directory, handover: handover)
      let file = try MemoryFile(name: "silent", length: 4096)
      let clients = try (0..<300).map { _ in try Client(service.socket) }
      let first: [UInt8] = Array((handover == "firecracker" ? "[{" : "FLHO").utf8)
      for client in clients where kind != .silence {
        // One on each byte, which is what there can be of them.
        let numbers = kind == .descriptors ? [file.descriptor.rawValue] : []
        try client.socket.send(Array(first.prefix(1)), descriptors: numbers)
      }
      let trickle = try ThreadHandle.start {
        guard kind == .trickle else { return }
        for byte in first.dropFirst() {
          Delay.microseconds(200_000)
          for client in clients { try? client.socket.send([byte]) }
        }
      }
      if handover == "firecracker" {
        let guest = try FirecrackerProcess(service.socket)
        #expect(Delay.until { (try? service.sessions().count) == 1 })
        #expect(clients.allSatisfy { !isClosed($0.socket) })
        #expect(try guest.finish() == ServeTests.right)
      } else {
        let vmm = try FakeFirecracker(regions: 2, pages: 512)
        let client = try attach(service, vmm)
        #expect(clients.allSatisfy { !isClosed($0.socket) })
        #expect(try vmm.wrongBlocks() == 0)
        withExtendedLifetime(client) {}
      }
      trickle.join()
      // Nor is anything of them kept.
      let areClosed = Delay.until { clients.allSatisfy { isClosed($0.socket) } }
      #expect(
        areClosed,
        "\(clients.count { isClosed($0.socket) }) \(service.daemon.messages.suffix(3000))")
      let held = { openDescriptors(of: "memfd:silent", process: service.daemon.identifier) }
      #expect(Delay.until { held() == 0 })
      #expect(try service.metric("faultline_handovers_total{result=\"timed_out\"}") == 300)
    }
  }

  @Test("No threads wait for them, and their places have an end", .timeLimit(.minutes(5)))
  func places() throws {
    try withTemporaryDirectory { directory in
      let service = try Service(
        in: directory, handover: "faultline",
        launcher: ["/bin/sh", "-c", "ulimit -n 1600; exec \"$@\"", "sh"])
      let threads = service.daemon.count("task")
      let file = try MemoryFile(name: "silent", length: 4096)
      // 200 places: 16 descriptors each, which is what a message may have.
      let clients = try (0..<100).map { _ in try Client(service.socket) }
      for client in clients {
        try? client.socket.send(
          [UInt8(ascii: "F")], descriptors: Array(repeating: file.descriptor.rawValue, count: 16))
      }
      let vmm = try FakeFirecracker(regions: 2, pages: 512)
      let client = try attach(service, vmm)
      #expect(openDescriptors(of: "memfd:silent", process: service.daemon.identifier) <= 216)
      // Those that close, attach and fill; not one for each of 100.
      #expect(service.daemon.count("task") <= threads + 40)
      // The oldest went first, and were told why.
      let answer = try clients[0].socket.receive(limit: 4096)
      #expect(String(decoding: answer.bytes, as: UTF8.self).contains("\"busy\""))
      #expect(try vmm.wrongBlocks() == 0)
      withExtendedLifetime(client) {}
    }
  }

  @Test("A daemon without descriptors says so, and goes on when there are some")
  func noDescriptors() throws {
    try withTemporaryDirectory { directory in
      let service = try Service(
        in: directory, handover: "faultline", regions: [8],
        launcher: ["/bin/sh", "-c", "ulimit -n 64; exec \"$@\"", "sh"])
      let vmms = try (0..<40).map { _ in try FakeFirecracker(regions: 1, pages: 8) }
      var served: [HandoverClient] = []
      var refused = 0
      for vmm in vmms {
        do {
          served.append(try attach(service, vmm))
        } catch let error as HandoverClientError {
          // In words, and not only closed.
          #expect(error.serviceCode != nil, "\(error)")
          refused += 1
        }
      }
      #expect(refused > 0 && served.count > 0, "\(service.daemon.messages.suffix(3000))")
      #expect(service.daemon.isRunning)
      served = []
      #expect(
        Delay.until {
          guard let late = try? FakeFirecracker(regions: 1, pages: 8) else { return false }
          return (try? attach(service, late)) != nil
        })
    }
  }

  @Test("A VMM that writes for ever after its hand-over takes nobody's time")
  func writesForEver() throws {
    try withTemporaryDirectory { directory in
      let service = try Service(in: directory, handover: "faultline")
      let (noisy, quiet) = (
        try FakeFirecracker(regions: 2, pages: 512), try FakeFirecracker(regions: 2, pages: 512)
      )
      let client = try attach(service, noisy)
      let other = try attach(service, quiet)
      let file = try MemoryFile(name: "noise", length: 4096)
      let noise = UnixSocket(owning: OwnedDescriptor(owning: dup(client.descriptor)))
      let gifts = UnixSocket(owning: OwnedDescriptor(owning: dup(other.descriptor)))
      var sent = 0
      while sent < 64 << 20 {
        let count = try noise.sendWithoutWaiting([UInt8](repeating: 7, count: 4096))
        if count == 0 { break }
        sent += count
      }
      // It waits for itself: nothing of it is read.
      #expect(sent < 64 << 20)
      try? gifts.send([1], descriptors: [file.descriptor.rawValue])
      #expect(openDescriptors(of: "memfd:noise", process: service.daemon.identifier) == 0)
      #expect(try quiet.wrongBlocks() == 0)
      #expect(try noisy.wrongBlocks() == 0)
      #expect(try service.request("DELETE", "/v1/sessions/1").hasPrefix("HTTP/1.1 202"))
      #expect(Delay.until { (try? service.sessions().count) == 1 })
      withExtendedLifetime((client, other)) {}
    }
  }

  @Test(
    "Descriptors whose close waits hold up neither hand-overs, nor sessions, nor the end",
    arguments: ["silence", "nonsense", "complete"])
  func lingering(what: String) throws {
    try withTemporaryDirectory { directory in
      let service = try Service(in: directory, handover: "faultline")
      let peer = try LingeringPeer()
      let frame: [UInt8] =
        switch what {
        case "silence": Array("FL".utf8)
        case "nonsense": Array("nonsense".utf8)
        default:
          try AttachMessage(
            regions: [AttachMessage.Region(hostAddress: 1 << 30, length: 4096, offset: 0)],
            name: nil, image: nil, memoryFiles: 0, options: nil
          ).frame()
        }
      let clients = try (0..<150).map { _ in try Client(service.socket) }
      for client in clients {
        let socket = try peer.connect()
        try client.socket.send(frame, descriptors: [socket.rawValue])
        // From here on the daemon has the last one.
      }
      if what == "silence" {
        // Until they have timed out.
        #expect(Delay.until { clients.allSatisfy { isClosed($0.socket) } })
      }
      let vmm = try FakeFirecracker(regions: 2, pages: 512)
      let client = try attach(service, vmm)
      #expect(try vmm.wrongBlocks() == 0)
      // Their closing waits for this peer, which has not read anything yet.
      #expect(service.daemon.threads(named: "close") > 1)
      service.daemon.send(SIGTERM)
      #expect(Delay.until { service.daemon.logged("the end") })
      #expect(try vmm.wrongBlocks() == 0)
      withExtendedLifetime((client, peer)) {}
    }
  }
}

/// A TCP peer that reads nothing, so that closing a connection to it waits (SO_LINGER, socket(7)).
private final class LingeringPeer: Sendable {
  private let listener: OwnedDescriptor
  private let port: UInt16

  init() throws {
    listener = OwnedDescriptor(
      owning: socket(AF_INET, Int32(SOCK_STREAM.rawValue) | Int32(SOCK_CLOEXEC.rawValue), 0))
    var address = sockaddr_in()
    address.sin_family = sa_family_t(AF_INET)
    address.sin_addr.s_addr = UInt32(0x7f00_0001).bigEndian
    var length = socklen_t(MemoryLayout<sockaddr_in>.size)
    let number = listener.rawValue
    let result = unsafe withUnsafeMutablePointer(to: &address) { pointer in
      unsafe pointer.withMemoryRebound(to: sockaddr.self, capacity: 1) { address in
        unsafe bind(number, address, length) == 0 && listen(number, 512) == 0
          && getsockname(number, address, &length) == 0
      }
    }
    guard result else { throw Errno(rawValue: errno) }
    port = UInt16(bigEndian: address.sin_port)
  }

  /// A connection whose buffers are full.
  func connect() throws -> OwnedDescriptor {
    let client = OwnedDescriptor(
      owning: socket(AF_INET, Int32(SOCK_STREAM.rawValue) | Int32(SOCK_CLOEXEC.rawValue), 0))
    var size: Int32 = 4096
    let number = client.rawValue
    _ = unsafe setsockopt(number, SOL_SOCKET, SO_SNDBUF, &size, 4)
    var address = sockaddr_in()
    address.sin_family = sa_family_t(AF_INET)
    address.sin_port = port.bigEndian
    address.sin_addr.s_addr = UInt32(0x7f00_0001).bigEndian
    let result = unsafe withUnsafePointer(to: &address) { pointer in
      unsafe pointer.withMemoryRebound(to: sockaddr.self, capacity: 1) { address in
        unsafe Glibc.connect(number, address, socklen_t(MemoryLayout<sockaddr_in>.size))
      }
    }
    guard result == 0 else { throw Errno(rawValue: errno) }
    var seconds = linger(l_onoff: 1, l_linger: 600)
    _ = unsafe setsockopt(number, SOL_SOCKET, SO_LINGER, &seconds, 8)
    let bytes = [UInt8](repeating: 1, count: 1 << 16)
    while unsafe send(number, bytes, bytes.count, Int32(MSG_DONTWAIT)) > 0 {}
    return client
  }
}

/// Descriptors of a process whose link in /proc contains a text.
private func openDescriptors(of text: String, process: Int32) -> Int {
  let directory = "/proc/\(process)/fd"
  let numbers = (try? FileManager.default.contentsOfDirectory(atPath: directory)) ?? []
  return numbers.count {
    (try? FileManager.default.destinationOfSymbolicLink(atPath: "\(directory)/\($0)"))?
      .contains(text) == true
  }
}
