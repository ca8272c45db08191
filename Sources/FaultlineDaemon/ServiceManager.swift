// SPDX-License-Identifier: Apache-2.0

internal import Glibc
internal import LinuxSystem
internal import SystemPackage

/// What systemd, or another manager that does as it does, is told and hands over
/// (sd_notify(3), sd_listen_fds(3), sd_watchdog_enabled(3)).
struct ServiceManager: Sendable {
  /// A socket that listens already.
  struct Inherited: Sendable {
    /// What the manager calls it; may be empty.
    let name: String
    /// Where it is bound; `nil` when it is no Unix stream socket that listens.
    let path: String?
    /// Its number; nobody else owns it.
    let descriptor: CInt
  }

  private let notifySocket: String?
  /// Not taken yet; each is taken once.
  private(set) var sockets: [Inherited] = []
  /// Seconds between signs of life: the manager wants twice as many.
  let interval: Double

  /// - Parameter environment: of this process.
  init(environment: [String: String]) {
    notifySocket = environment["NOTIFY_SOCKET"]
    let isWatched = environment["WATCHDOG_PID"].map { $0 == "\(getpid())" } ?? true
    let limit = environment["WATCHDOG_USEC"].flatMap(UInt64.init).map { Double($0) / 2e6 }
    interval = min(5, max(0.05, isWatched ? limit ?? 5 : 5))
    guard environment["LISTEN_PID"] == "\(getpid())",
      let count = environment["LISTEN_FDS"].flatMap(Int.init), (1...1024).contains(count)
    else { return }
    let names = (environment["LISTEN_FDNAMES"] ?? "").split(
      separator: ":", omittingEmptySubsequences: false)
    sockets = (0..<count).map { index in
      let descriptor = CInt(3 + index)
      _ = fcntl(descriptor, F_SETFD, FD_CLOEXEC)
      return Inherited(
        name: index < names.count ? String(names[index]) : "", path: Self.path(of: descriptor),
        descriptor: descriptor)
    }
  }

  /// Takes the sockets that are bound to some paths, and for those that are left the ones that
  /// have the path, or its last part, as their names.
  ///
  /// - Returns: descriptors, by path; the caller owns them.
  mutating func takeSockets(for paths: [String]) -> [String: CInt] {
    var taken: [String: CInt] = [:]
    let rules: [(Inherited, String) -> Bool] = [
      { $0.path == $1 }, { $0.name == $1 },
      { $0.name == FilePath($1).lastComponent?.string },
    ]
    for rule in rules {
      for path in paths where taken[path] == nil {
        guard let index = sockets.firstIndex(where: { $0.path != nil && rule($0, path) }) else {
          continue
        }
        taken[path] = sockets.remove(at: index).descriptor
      }
    }
    return taken
  }

  /// Where a Unix stream socket listens.
  private static func path(of descriptor: CInt) -> String? {
    var (isListening, kind): (CInt, CInt) = (0, 0)
    var size = socklen_t(MemoryLayout<CInt>.size)
    guard unsafe getsockopt(descriptor, SOL_SOCKET, SO_ACCEPTCONN, &isListening, &size) == 0,
      unsafe getsockopt(descriptor, SOL_SOCKET, SO_TYPE, &kind, &size) == 0, isListening == 1,
      kind == CInt(SOCK_STREAM.rawValue)
    else { return nil }
    var address = sockaddr_un()
    var length = socklen_t(MemoryLayout<sockaddr_un>.size)
    let result = unsafe withUnsafeMutablePointer(to: &address) { pointer in
      unsafe pointer.withMemoryRebound(to: sockaddr.self, capacity: 1) { address in
        // SAFETY: `length` is the size of what `address` points to.
        unsafe getsockname(descriptor, address, &length)
      }
    }
    guard result == 0, address.sun_family == sa_family_t(AF_UNIX) else { return nil }
    return unsafe withUnsafeBytes(of: &address.sun_path) { bytes in
      unsafe String(decoding: bytes.prefix { $0 != 0 }, as: UTF8.self)
    }
  }

  /// Tells the manager, such as "READY=1"; without one it does nothing.
  func notify(_ text: String) {
    guard let notifySocket, let first = notifySocket.utf8.first else { return }
    var address = sockaddr_un()
    address.sun_family = sa_family_t(AF_UNIX)
    var path = Array(notifySocket.utf8)
    guard path.count < MemoryLayout.size(ofValue: address.sun_path) else { return }
    // An abstract name.
    if first == UInt8(ascii: "@") { path[0] = 0 }
    unsafe withUnsafeMutableBytes(of: &address.sun_path) { unsafe $0.copyBytes(from: path) }
    let socket = socket(AF_UNIX, CInt(SOCK_DGRAM.rawValue) | CInt(SOCK_CLOEXEC.rawValue), 0)
    guard socket >= 0 else { return }
    let descriptor = OwnedDescriptor(owning: socket)
    let length = MemoryLayout<sa_family_t>.size + path.count
    let bytes = Array(text.utf8)
    unsafe withUnsafePointer(to: &address) { pointer in
      unsafe pointer.withMemoryRebound(to: sockaddr.self, capacity: 1) { address in
        // SAFETY: the address is as long as `length` says; what is lost is lost.
        _ = unsafe sendto(
          descriptor.rawValue, bytes, bytes.count, CInt(MSG_NOSIGNAL), address,
          socklen_t(length))
      }
    }
  }
}
