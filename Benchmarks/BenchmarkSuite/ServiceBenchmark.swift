// SPDX-License-Identifier: Apache-2.0

import Foundation
import LinuxSystem
import MemoryImage
import Pager
import Synchronization
import SystemPackage
import Userfault

/// The daemon, as a process of its own: from a hand-over to the first fault that is served, and
/// the memory that it takes.
struct ServiceBenchmark {
  /// An image of 1 GiB of data.
  let image: FilePath
  let rounds: Int

  func results() throws -> [BenchmarkResult] {
    let directory = FileManager.default.temporaryDirectory.path + "/faultline-bench-\(UUID())"
    try FileManager.default.createDirectory(atPath: directory, withIntermediateDirectories: false)
    defer { try? FileManager.default.removeItem(atPath: directory) }
    return try handovers(directory) + [try memory(directory)]
  }

  // MARK: - The first fault

  private func handovers(_ directory: String) throws -> [BenchmarkResult] {
    let sizes = [1 << 30, 64 << 30]
    var times: [[Double]] = [[], []]
    let images = try sizes.map { try sparseImage($0) }
    defer { for image in images { try? removeFile(image) } }
    let services = try images.enumerated().map { number, image in
      try Service(image: image, socket: "\(directory)/\(number).sock", [])
    }
    for round in 0...max(rounds * 4, 20) {
      for (number, service) in services.enumerated() {
        let vmm = try VMM(length: sizes[number])
        let start = MonotonicClock.nanoseconds
        try vmm.handOver(to: service.socket)
        let word = vmm.touch(page: 4096)
        let time = Double(MonotonicClock.nanoseconds - start) / 1e6
        guard word == 4097 else { throw Errno.ioError }
        if round > 0 { times[number].append(time) }
      }
    }
    for service in services { service.stop() }
    return [
      BenchmarkResult(name: "serve.first-fault.1G", unit: "ms", ours: times[0], .atMost(2)),
      BenchmarkResult(name: "serve.first-fault.64G", unit: "ms", ours: times[1], .atMost(2)),
      BenchmarkResult(
        name: "serve.first-fault.64G-to-1G", unit: "ms", ours: times[1], peer: times[0],
        .atMost(1.25)),
    ]
  }

  /// A page of data in each 16 MiB, and zeros.
  private func sparseImage(_ length: Int) throws -> FilePath {
    let path = temporaryImage("sparse")
    let writer = try ImageWriter(
      path: path,
      regions: [
        ImageRegion(
          name: "ram", guestAddress: GuestAddress(0), length: length, pageSize: .size4KiB)
      ])
    for block in stride(from: 0, to: length / 4096, by: 4096) {
      let words = [UInt64](repeating: UInt64(block + 1), count: 512)
      // SAFETY: a page of words.
      try unsafe words.withUnsafeBytes { bytes in
        try unsafe writer.write(region: 0, firstBlock: block, bytes: bytes)
      }
    }
    try writer.finish()
    return path
  }

  // MARK: - Memory

  /// What the daemon has more than before its first guest, with four guests of 1 GiB that have
  /// all their pages, against 1 MiB for each GiB and 256 KiB for each session.
  private func memory(_ directory: String) throws -> BenchmarkResult {
    let count = 4
    let service = try Service(
      image: image, socket: directory + "/memory.sock", ["--fill-rate", "64G"])
    defer { service.stop() }
    let length = try MemoryImage(path: image).regions[0].length
    let idle = service.anonymousKiB
    var guests: [VMM] = []
    for _ in 0..<count {
      let vmm = try VMM(length: length)
      try vmm.handOver(to: service.socket)
      vmm.touchAll()
      guests.append(vmm)
    }
    Thread.sleep(forTimeInterval: 2)
    let grown = Double(service.anonymousKiB - idle)
    withExtendedLifetime(guests) {}
    let allowed = Double(count) * (1024 * Double(length) / Double(1 << 30) + 256)
    return BenchmarkResult(
      name: "serve.memory.4-sessions", unit: "KiB", ours: [grown], peer: [allowed], .atMost(1))
  }
}

/// `faultline serve` of this executable.
private final class Service: Sendable {
  let socket: FilePath
  private let process: Process

  init(image: FilePath, socket: String, _ arguments: [String]) throws {
    self.socket = FilePath(socket)
    process = Process()
    process.executableURL = URL(fileURLWithPath: "/proc/self/exe").resolvingSymlinksInPath()
    process.arguments =
      ["serve", "--socket", socket, "--image", image.string, "--log-level", "error"] + arguments
    process.standardInput = FileHandle.nullDevice
    try process.run()
    for _ in 0..<10_000 where !FileManager.default.fileExists(atPath: socket) { usleep(1000) }
    usleep(50_000)
  }

  deinit { stop() }

  func stop() {
    guard process.isRunning else { return }
    kill(process.processIdentifier, SIGKILL)
    process.waitUntilExit()
  }

  /// Its memory without files, in KiB (RssAnon, proc(5)).
  var anonymousKiB: Int {
    let path = URL(fileURLWithPath: "/proc/\(process.processIdentifier)/status")
    guard let bytes = try? FileHandle(forReadingFrom: path).readToEnd() else { return 0 }
    let text = String(decoding: bytes, as: UTF8.self)
    let line = text.split(separator: "\n").first { $0.hasPrefix("RssAnon:") }
    return line.flatMap { Int($0.filter(\.isNumber)) } ?? 0
  }
}

/// Memory that is handed over as Firecracker does.
private final class VMM: Sendable {
  private let mapping: Mapping
  private let userfaultfd: Userfaultfd
  /// Stays open as long as the VMM.
  private let connection = Mutex<Connection?>(nil)

  private final class Connection: Sendable {
    let socket: UnixSocket
    init(_ socket: consuming UnixSocket) { self.socket = socket }
  }

  init(length: Int) throws {
    mapping = try Mapping(anonymous: length)
    userfaultfd = try Userfaultfd(wanting: .removeEvents)
    try userfaultfd.register(mapping.range, modes: .missing)
  }

  func handOver(to path: FilePath) throws {
    let range = mapping.range
    let connection = Connection(try UnixSocket(connectingTo: path))
    let message =
      "[{\"base_host_virt_addr\":\(range.start.rawValue),\"size\":\(range.length),\"offset\":0,"
      + "\"page_size\":4096,\"page_size_kib\":4096}]"
    try connection.socket.send(Array(message.utf8), descriptors: [userfaultfd.descriptor.rawValue])
    self.connection.withLock { $0 = connection }
  }

  func touch(page: Int) -> UInt64 {
    // SAFETY: the page lies in the mapping.
    unsafe (mapping.pointer + page * 4096).load(as: UInt64.self)
  }

  func touchAll() {
    var sum: UInt64 = 0
    for page in 0..<mapping.length / 4096 { sum &+= touch(page: page) }
    withExtendedLifetime(sum) {}
  }
}
