// SPDX-License-Identifier: Apache-2.0

internal import Glibc
internal import LinuxSystem
internal import SystemPackage

/// What systemd, or another manager that does as it does, is told and hands over
/// (sd_notify(3), sd_listen_fds(3)).
struct ServiceManager: Sendable {
  private let notifySocket: String?
  /// Descriptors of sockets that listen already, by their names.
  let sockets: [(name: String, descriptor: CInt)]

  /// - Parameter environment: of this process.
  init(environment: [String: String]) {
    notifySocket = environment["NOTIFY_SOCKET"]
    guard environment["LISTEN_PID"] == "\(getpid())",
      let count = environment["LISTEN_FDS"].flatMap(Int.init), (1...1024).contains(count)
    else {
      sockets = []
      return
    }
    let names = (environment["LISTEN_FDNAMES"] ?? "").split(
      separator: ":", omittingEmptySubsequences: false)
    sockets = (0..<count).map { index in
      let descriptor = CInt(3 + index)
      _ = fcntl(descriptor, F_SETFD, FD_CLOEXEC)
      return (index < names.count ? String(names[index]) : "", descriptor)
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
