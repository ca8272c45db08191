// SPDX-License-Identifier: Apache-2.0

package import Foundation
import Glibc
package import LinuxSystem
package import Pager
import SystemPackage
import Userfault

/// The executable `guest-process` and the descriptor that it handed over.
package final class GuestProcess: Sendable {
  package let process: Process
  package let socket: UnixSocket
  package let region: PagedRegion
  private let received: OwnedDescriptor
  private let features: UserfaultFeatures

  /// - Parameters:
  ///   - givesBack: it also drops pages that it has read, and ends only when it is killed.
  ///   - forks: it forks so many children before it reads, as deep as that (`forked`).
  package init(
    pages: Int, threads: Int, givesBack: Bool = false, forks: (count: Int, depth: Int)? = nil
  ) throws {
    let path = FileManager.default.temporaryDirectory.path + "/faultline-\(UUID().uuidString)"
    let listener = try UnixListener(path: FilePath(path))
    defer { try? FileManager.default.removeItem(atPath: path) }
    let process = Process()
    process.executableURL = builtProduct("guest-process")
    process.arguments = [path, "\(pages)", "\(threads)"] + (givesBack ? ["gives-back"] : [])
    if let forks { process.arguments? += ["forks", "\(forks.count)", "\(forks.depth)"] }
    try launch(process)
    let socket = try listener.accept()
    let message = try socket.receive(limit: 128)
    let words = String(decoding: message.bytes, as: UTF8.self).split(separator: " ")
    guard message.descriptors.count == 1, words.count == 2, let start = UInt64(words[0]),
      let features = UInt64(words[1])
    else { throw Errno.protocolError }
    received = OwnedDescriptor(owning: message.descriptors[0])
    self.features = UserfaultFeatures(rawValue: features)
    region = try PagedRegion(
      host: HostRange(start: HostAddress(start), length: pages * 4096), pageSize: .size4KiB,
      guestAddress: GuestAddress(0))
    self.process = process
    self.socket = socket
  }

  deinit { kill() }

  /// A session over a duplicate of the descriptor; the page states are shared by all.
  ///
  /// - Parameter peer: the process that hands over, if it is another one.
  package func session<Source: PageSource>(
    _ source: Source, watchesProcess: Bool = true, faultAround: FaultAround = .off,
    onDamage: DamagePolicy = .poison, faultThreads: Int = 1, peer: CInt? = nil
  ) throws -> PagerSession<Source> {
    var options = PagerOptions(faultThreads: faultThreads)
    options.faultAround = faultAround
    options.onDamage = onDamage
    let userfaultfd = try Userfaultfd(adopting: received.duplicate(), features: features)
    guard watchesProcess else {
      return try PagerSession(
        userfaultfd: userfaultfd, regions: [region], source: source, options: options,
        registers: false)
    }
    return try PagerSession(
      userfaultfd: userfaultfd, regions: [region], source: source, options: options,
      registers: false,
      process: try openProcess(peer ?? process.processIdentifier))
  }

  /// Lets its threads begin.
  package func go() throws { try socket.send([1]) }

  /// Waits until it has forked its children.
  package func awaitForks() throws {
    guard try socket.receive(limit: 64).bytes == Array("forked".utf8) else {
      throw Errno.protocolError
    }
  }

  /// Has the children read, and waits for that.
  ///
  /// - Returns: words that were zero and should not be, and children that were lost.
  package func readInForks() throws -> [Int] {
    try socket.send([1])
    return String(decoding: try socket.receive(limit: 64).bytes, as: UTF8.self).split(
      separator: " "
    )
    .compactMap { Int($0) }
  }

  /// How many wrong words it read, when it is through.
  package func wrongWords() throws -> Int? {
    Int(String(decoding: try socket.receive(limit: 64).bytes, as: UTF8.self))
  }

  /// kill -9, and waits until it is gone.
  package func kill() {
    if process.isRunning { _ = Glibc.kill(process.processIdentifier, SIGKILL) }
    process.waitUntilExit()
  }
}

/// An executable of this package, beside the running test.
package func builtProduct(_ name: String) -> URL {
  URL(fileURLWithPath: "/proc/self/exe").resolvingSymlinksInPath().deletingLastPathComponent()
    .appendingPathComponent(name)
}
