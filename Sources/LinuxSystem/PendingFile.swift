// SPDX-License-Identifier: Apache-2.0

internal import CLinux
public import SystemPackage

/// A file that is being written and takes its name only when it is complete.
///
/// Until `publish` the target is what it was. The file has no name (O_TMPFILE, open(2)),
/// so the kernel frees it when the process dies; on a filesystem without O_TMPFILE it is
/// a hidden file in the same directory, which `deinit` removes.
public struct PendingFile: ~Copyable, Sendable {
  /// The file, open for reading and writing, mode 0600.
  public let descriptor: OwnedDescriptor

  private let directory: OwnedDescriptor
  private let name: FilePath
  /// The hidden name that has to go away again; `nil` while the file has none.
  private var temporaryName: FilePath?

  /// Starts a file that will appear under `path`.
  ///
  /// Throws `isDirectory`, `tooManySymbolicLinkLevels` (a symbolic link) or `fileExists`
  /// when the path names something that is not a regular file, and what the kernel says
  /// about the directory.
  ///
  /// - Parameter unnamed: `false` uses a hidden name even where the filesystem could do
  ///   without.
  public init(at path: FilePath, unnamed: Bool = true) throws(Errno) {
    guard let component = path.lastComponent, component.kind == .regular else {
      throw .invalidArgument
    }
    let parent = path.removingLastComponent()
    let directory = OwnedDescriptor(
      owning: CInt(
        try (parent.isEmpty ? FilePath(".") : parent)
          .openAt(AT_FDCWD, flags: O_RDONLY | O_DIRECTORY | O_CLOEXEC)))
    let name = FilePath(root: nil, [component])
    try Self.checkReplaceable(name, in: directory)

    var opened = -Int(EOPNOTSUPP)
    if unnamed {
      opened = unsafe FilePath(".").withPlatformString { here in
        unsafe clinux_openat(directory.rawValue, here, Self.unnamedFlags, 0o600)
      }
    }
    // A filesystem that has no O_TMPFILE says one of these (open(2)).
    if opened == -Int(EOPNOTSUPP) || opened == -Int(EISDIR) || opened == -Int(EINVAL) {
      let temporaryName = Self.makeTemporaryName()
      let flags = O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC
      descriptor = OwnedDescriptor(
        owning: CInt(try temporaryName.openAt(directory.rawValue, flags: flags, mode: 0o600)))
      self.temporaryName = temporaryName
    } else {
      descriptor = OwnedDescriptor(owning: CInt(try check(opened)))
      temporaryName = nil
    }
    self.directory = directory
    self.name = name
  }

  deinit {
    if let temporaryName { Self.unlink(temporaryName, in: directory) }
  }

  /// Whether the file has no name yet, so that nothing is left if the process is killed.
  public var isUnnamed: Bool { temporaryName == nil }

  /// Gives the file its name, in place of a file that has it now.
  ///
  /// It does not sync: do that with the file before and with the directory after.
  /// When it throws, the target is as before and the file is gone.
  ///
  /// - Returns: the directory, for `synchronize`.
  public consuming func publish() throws(Errno) -> OwnedDescriptor {
    let directory = try self.directory.duplicate()
    if temporaryName == nil {
      let linked = link(as: name)
      if linked >= 0 { return directory }
      // linkat(2) cannot replace; rename(2) can, but needs a name to start from.
      guard linked == -Int(EEXIST) else { throw Errno(rawValue: CInt(-linked)) }
      let hidden = Self.makeTemporaryName()
      _ = try check(link(as: hidden))
      temporaryName = hidden
    }
    let target = name
    let number = directory.rawValue
    if let hidden = temporaryName {
      let renamed = unsafe hidden.withPlatformString { from in
        unsafe target.withPlatformString { to in
          unsafe clinux_renameat(number, from, number, to)
        }
      }
      _ = try check(renamed)
      temporaryName = nil
    }
    return directory
  }

  // MARK: - Steps

  // O_TMPFILE and O_PATH, which the C headers show only to _GNU_SOURCE.
  private static var unnamedFlags: CInt { 0o20_000_000 | O_DIRECTORY | O_RDWR | O_CLOEXEC }
  private static var lookFlags: CInt { 0o10_000_000 | O_NOFOLLOW | O_CLOEXEC }

  private static func makeTemporaryName() -> FilePath {
    FilePath(".faultline-\(String(UInt64.random(in: .min ... .max), radix: 16)).tmp")
  }

  private static func checkReplaceable(
    _ name: FilePath, in directory: borrowing OwnedDescriptor
  ) throws(Errno) {
    let number = directory.rawValue
    let opened = unsafe name.withPlatformString { unsafe clinux_openat(number, $0, lookFlags, 0) }
    if opened == -Int(ENOENT) { return }
    let existing = OwnedDescriptor(owning: CInt(try check(opened)))
    let status = try existing.status
    if status.isDirectory { throw .isDirectory }
    if status.isSymbolicLink { throw .tooManySymbolicLinkLevels }
    if !status.isRegular { throw .fileExists }
  }

  private static func unlink(_ name: FilePath, in directory: borrowing OwnedDescriptor) {
    let number = directory.rawValue
    // Nobody is left to tell: the file stays, under a name that says what it is.
    _ = unsafe name.withPlatformString { unsafe clinux_unlinkat(number, $0) }
  }

  private borrowing func link(as name: FilePath) -> Int {
    let (file, parent) = (descriptor.rawValue, directory.rawValue)
    return unsafe name.withPlatformString { unsafe clinux_link_open_file(file, parent, $0) }
  }
}
