// SPDX-License-Identifier: Apache-2.0

internal import DaemonConfiguration
internal import Glibc
internal import LinuxSystem
internal import Logging
internal import Synchronization
internal import SystemPackage

/// A socket on which VMMs hand over, and the thread that accepts them. Each hand-over has a
/// thread for as long as it takes, so that a slow one delays no other.
final class VMMListener: Sendable {
  private let listener: UnixListener
  private let configuration: ListenConfiguration
  /// Whether the file is ours to remove.
  private let ownsPath: Bool
  private let stopSign: EventDescriptor
  private let handovers = Monitor(0)
  private let thread = Mutex<JoinedThread?>(nil)
  private let log: Logger

  /// Hand-overs under way at a time; more wait in the socket's queue.
  private static var handoverLimit: Int { 64 }

  /// Listens. A socket that nobody answers on any more is replaced; throws where somebody does.
  ///
  /// - Parameter inherited: a socket that listens already, or -1.
  init(_ configuration: ListenConfiguration, inherited: CInt, log: Logger) throws {
    self.configuration = configuration
    self.log = log
    stopSign = try EventDescriptor()
    ownsPath = inherited < 0
    if inherited >= 0 {
      listener = UnixListener(owning: OwnedDescriptor(owning: inherited))
    } else {
      try SocketPath.clear(configuration.socket)
      do throws(Errno) {
        listener = try SocketPath.withMode(configuration.mode) { () throws(Errno) in
          try UnixListener(path: FilePath(configuration.socket), backlog: 128)
        }
      } catch {
        throw DaemonError("the socket \(configuration.socket) cannot be made: \(error)")
      }
    }
    try listener.descriptor.setNonBlocking(true)
  }

  /// Starts to accept.
  ///
  /// - Parameter handle: one VMM, in a thread of its own; gets the stop sign's descriptor.
  func start(_ handle: @escaping @Sendable (consuming UnixSocket, CInt) -> Void) throws(Errno) {
    let thread = JoinedThread(
      try NamedThread(name: "accept") { [self] in accept(handle) })
    self.thread.withLock { $0 = thread }
  }

  /// Accepts no more, ends the hand-overs that are under way, and removes the socket.
  func stop() {
    stopSign.signal()
    thread.withLock { $0 }?.join()
    handovers.wait { $0 == 0 ? () : nil }
    if ownsPath { unsafe unlink(configuration.socket) }
  }

  private func accept(_ handle: @escaping @Sendable (consuming UnixSocket, CInt) -> Void) {
    let set = PollSet(listener.descriptor.rawValue, stopSign.descriptor.rawValue)
    let sign = stopSign.descriptor.rawValue
    var isFailing = false
    while true {
      guard let ready = try? set.wait() else { continue }
      if ready.tag == 1 { return }
      do throws(Errno) {
        let socket = SocketBox(try listener.accept())
        isFailing = false
        handovers.wait { count -> Void? in
          guard count < Self.handoverLimit else { return nil }
          count += 1
          return ()
        }
        do throws(Errno) {
          _ = try NamedThread(name: "handover") {
            if let socket = socket.take() { handle(socket, sign) }
            self.handovers.withLock { $0 -= 1 }
          }
        } catch {
          handovers.withLock { $0 -= 1 }
          throw error
        }
      } catch .resourceTemporarilyUnavailable {
        // It went away before it was accepted.
      } catch {
        // Such as too many open files: it is tried again, and said once.
        if !isFailing {
          log.error("no VMM can be accepted on \(configuration.socket): \(error)")
        }
        isFailing = true
        Pause.milliseconds(100)
      }
    }
  }
}

/// Carries a connection to its thread.
final class SocketBox: Sendable {
  private let socket: Mutex<UnixSocket?>
  init(_ socket: consuming UnixSocket) { self.socket = Mutex(socket) }
  func take() -> UnixSocket? { socket.withLock { $0.take() } }
}

/// The files of Unix sockets.
enum SocketPath {
  /// Removes a socket that nobody answers on any more. Throws where somebody does, and where
  /// something else has the name.
  static func clear(_ path: String) throws(DaemonError) {
    var status = stat()
    guard unsafe lstat(path, &status) == 0 else { return }
    guard status.st_mode & S_IFMT == S_IFSOCK else {
      throw DaemonError("\(path) is there and is no socket. Name another one, or remove it.")
    }
    do throws(Errno) {
      _ = try UnixSocket(connectingTo: FilePath(path))
    } catch .connectionRefused {
      unsafe unlink(path)
      return
    } catch {
      throw DaemonError("\(path) is there and cannot be replaced: \(error)")
    }
    throw DaemonError("\(path) is in use: another daemon answers there.")
  }

  /// Runs a body that binds a socket with the permissions that the file is to have from its
  /// first moment. For the daemon's start, when nothing else makes files.
  static func withMode<Value: ~Copyable, Failure: Error>(
    _ mode: UInt16, _ body: () throws(Failure) -> Value
  ) throws(Failure) -> Value {
    let before = umask(~mode_t(mode) & 0o777)
    defer { umask(before) }
    return try body()
  }
}

/// Short waits.
enum Pause {
  static func milliseconds(_ count: UInt32) { usleep(count * 1000) }
}

/// Why the daemon cannot do what it was asked; what failed and what to do about it.
public struct DaemonError: Error, Sendable, CustomStringConvertible {
  /// In words.
  public let description: String
  init(_ description: String) { self.description = description }
}
