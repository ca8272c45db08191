// SPDX-License-Identifier: Apache-2.0

internal import Glibc
internal import LinuxSystem
internal import SystemPackage

/// The path of a Unix socket that this process has and no other: it holds the lock of a file beside
/// it (flock(2)), from before it removes a socket that nobody answers on until its own is gone. So of
/// two that start at once one removes and binds, and neither removes what the other has bound.
struct SocketPath: ~Copyable {
  let path: String
  private let lock: OwnedDescriptor

  /// Takes a path, and removes a socket that nobody answers on any more. Throws where somebody does,
  /// and where something else has the name.
  init(_ path: String) throws(DaemonError) {
    let lockPath = path + ".lock"
    var holder = ""
    while true {
      let number = unsafe open(lockPath, O_CREAT | O_RDWR | O_CLOEXEC | O_NOFOLLOW, 0o600)
      guard number >= 0 else {
        throw DaemonError(
          "\(path) cannot be had: \(lockPath), its lock: \(Errno(rawValue: errno))")
      }
      let lock = OwnedDescriptor(owning: number)
      do throws(Errno) {
        guard try lock.lockExclusively() else {
          holder = Self.holder(of: lock)
          break
        }
        // Whoever had it may have removed it meanwhile: then it is no lock any more.
        var status = stat()
        guard unsafe lstat(lockPath, &status) == 0,
          try lock.status.identity.inode == UInt64(status.st_ino)
        else { continue }
        try lock.setLength(0)
        try lock.writeAll(Array("\(getpid())\n".utf8), at: 0)
      } catch {
        throw DaemonError("\(path) cannot be had: \(lockPath), its lock: \(error)")
      }
      try Self.clear(path)
      self.path = path
      self.lock = lock
      return
    }
    throw DaemonError("\(path) is in use: another daemon answers there\(holder).")
  }

  deinit {
    unsafe unlink(path)
    unsafe unlink(path + ".lock")
  }

  /// Listens there, with the permissions that the file is to have from its first moment. For the
  /// daemon's start, when nothing else makes files.
  borrowing func listen(mode: UInt16, backlog: CInt = 128) throws(DaemonError) -> UnixListener {
    let before = umask(~mode_t(mode) & 0o777)
    defer { umask(before) }
    do throws(Errno) {
      return try UnixListener(path: FilePath(path), backlog: backlog)
    } catch {
      throw DaemonError("the socket \(path) cannot be made: \(error)")
    }
  }

  /// " (process 12)", if it says so.
  private static func holder(of lock: borrowing OwnedDescriptor) -> String {
    var bytes = [UInt8](repeating: 0, count: 16)
    let count = unsafe bytes.withUnsafeMutableBytes { room in
      // SAFETY: the room is as long as it says.
      unsafe pread(lock.rawValue, room.baseAddress, room.count, 0)
    }
    let digits = bytes.prefix(max(0, count)).prefix { (0x30...0x39).contains($0) }
    return digits.isEmpty ? "" : " (process \(String(decoding: digits, as: UTF8.self)))"
  }

  private static func clear(_ path: String) throws(DaemonError) {
    var status = stat()
    guard unsafe lstat(path, &status) == 0 else { return }
    guard status.st_mode & S_IFMT == S_IFSOCK else {
      throw DaemonError("\(path) is there and is no socket. Name another one, or remove it.")
    }
    do throws(Errno) {
      _ = try UnixSocket(connectingTo: FilePath(path), waits: false)
    } catch .connectionRefused {
      unsafe unlink(path)
      return
    } catch .resourceTemporarilyUnavailable {
      // Its queue is full: it listens.
    } catch {
      throw DaemonError("\(path) is there and cannot be replaced: \(error)")
    }
    throw DaemonError("\(path) is in use: another daemon answers there.")
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
