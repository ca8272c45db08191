// SPDX-License-Identifier: Apache-2.0

internal import CLinux
public import SystemPackage

/// The one owner of a file descriptor; it is closed when the owner goes away.
public struct OwnedDescriptor: ~Copyable, Sendable {
  /// The number, valid as long as this owner lives.
  public let rawValue: CInt

  /// Takes ownership of an open descriptor.
  public init(owning rawValue: CInt) { self.rawValue = rawValue }

  deinit { _ = clinux_close(rawValue) }

  /// Closes and reports what the kernel said (close(2)). The descriptor is gone
  /// also when this throws.
  public consuming func close() throws(Errno) {
    let number = release()
    _ = try check(clinux_close(number))
  }

  /// Gives the number up without closing it.
  public consuming func release() -> CInt {
    let number = rawValue
    discard self
    return number
  }

  /// A second descriptor of the same open file, close-on-exec.
  public borrowing func duplicate() throws(Errno) -> OwnedDescriptor {
    OwnedDescriptor(owning: CInt(try check(clinux_dup(rawValue))))
  }

  /// Adds or removes O_NONBLOCK (fcntl(2), F_SETFL). It belongs to the open file,
  /// so every duplicate sees it.
  public borrowing func setNonBlocking(_ enabled: Bool) throws(Errno) {
    let flags = CInt(try check(clinux_status_flags(rawValue)))
    let wanted = enabled ? flags | O_NONBLOCK : flags & ~O_NONBLOCK
    _ = try check(clinux_set_status_flags(rawValue, wanted))
  }
}

// MARK: - What the kernel says of it

extension OwnedDescriptor {
  /// What it refers to, in the kernel's words (/proc/self/fd): a path, or something like
  /// "anon_inode:[userfaultfd]". The first 4096 bytes.
  public var kernelName: String {
    get throws(Errno) {
      var bytes = [UInt8](repeating: 0, count: 4096)
      let length = unsafe bytes.withUnsafeMutableBytes { room in
        unsafe clinux_readlink("/proc/self/fd/\(rawValue)", room.baseAddress, room.count)
      }
      return String(decoding: bytes.prefix(try check(length)), as: UTF8.self)
    }
  }

  /// What the kernel tells of its state (/proc/self/fdinfo, proc(5)). The first 4096 bytes.
  public var kernelInformation: String {
    get throws(Errno) {
      let file = try OwnedDescriptor(openingForReading: FilePath("/proc/self/fdinfo/\(rawValue)"))
      var bytes = [UInt8](repeating: 0, count: 4096)
      let result = unsafe bytes.withUnsafeMutableBytes { room in
        unsafe clinux_read(file.rawValue, room.baseAddress, room.count)
      }
      return String(decoding: bytes.prefix(try check(result)), as: UTF8.self)
    }
  }
}
