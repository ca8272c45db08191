// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import Glibc
public import SystemPackage

/// What fstat(2) says about an open file.
public struct FileStatus: Hashable, Sendable {
  /// Bytes, holes included.
  public let length: Int
  /// Bytes that the filesystem has set aside.
  public let allocatedBytes: Int
  /// Bytes that the filesystem reads and writes best, and on most the smallest piece that it
  /// keeps (st_blksize).
  public let blockLength: Int
  /// Whether it is a regular file; false for directories, devices, pipes, links.
  public let isRegular: Bool
  /// Whether it is a symbolic link; only of one opened as such (O_PATH, O_NOFOLLOW).
  public let isSymbolicLink: Bool
  /// Whether it is a directory.
  public let isDirectory: Bool
  /// What tells the file from every other one, whatever its names.
  public let identity: FileIdentity
  /// When its content was written last, in nanoseconds since 1970 (st_mtim).
  public let modified: Int
  /// When that, or its names or permissions changed last (st_ctim).
  public let changed: Int

  /// What stat(2) says about what a path names; `nil` where it names nothing that can be seen.
  public init?(at path: FilePath) {
    let pathOnly: CInt = 0o10_000_000  // O_PATH
    guard let opened = try? path.openAt(AT_FDCWD, flags: pathOnly | O_CLOEXEC) else { return nil }
    let descriptor = OwnedDescriptor(owning: CInt(opened))
    guard let status = try? Self(ofDescriptor: descriptor.rawValue) else { return nil }
    self = status
  }

  init(ofDescriptor number: CInt) throws(Errno) {
    var status = stat()
    _ = try unsafe check(clinux_fstat(number, &status))
    let kind = CInt(bitPattern: status.st_mode) & S_IFMT
    length = Int(status.st_size)
    allocatedBytes = Int(status.st_blocks) * 512
    blockLength = Int(status.st_blksize)
    isRegular = kind == S_IFREG
    isSymbolicLink = kind == S_IFLNK
    isDirectory = kind == S_IFDIR
    identity = FileIdentity(device: UInt64(status.st_dev), inode: UInt64(status.st_ino))
    // Wraps for times that no file has.
    modified = status.st_mtim.tv_sec &* 1_000_000_000 &+ status.st_mtim.tv_nsec
    changed = status.st_ctim.tv_sec &* 1_000_000_000 &+ status.st_ctim.tv_nsec
  }
}

/// The device and inode of a file (inode(7)).
public struct FileIdentity: Hashable, Sendable {
  /// The filesystem's device.
  public let device: UInt64
  /// The file's number in it.
  public let inode: UInt64
}

// MARK: - Files on storage

extension OwnedDescriptor {
  /// Opens a file for reading, close-on-exec. A pipe does not block the call.
  public init(openingForReading path: FilePath) throws(Errno) {
    let flags = O_RDONLY | O_CLOEXEC | O_NONBLOCK
    let opened = try path.openAt(AT_FDCWD, flags: flags)
    self.init(owning: CInt(opened))
  }

  /// Opens a file for reading and writing, close-on-exec. A pipe does not block the call.
  public init(openingForUpdate path: FilePath) throws(Errno) {
    let opened = try path.openAt(AT_FDCWD, flags: O_RDWR | O_CLOEXEC | O_NONBLOCK)
    self.init(owning: CInt(opened))
  }

  /// Takes the file's lock (flock(2), LOCK_EX) until the descriptor is closed; `false` when
  /// somebody else has it.
  public borrowing func lockExclusively() throws(Errno) -> Bool {
    do throws(Errno) {
      _ = try retryingInterrupted { clinux_try_lock(rawValue) }
      return true
    } catch .wouldBlock {
      return false
    }
  }

  /// Reads up to as many bytes as there is room for (pread(2), one call).
  ///
  /// - Parameter waits: `false` reads what is in the page cache and throws `wouldBlock` in
  ///   place of waiting for storage (preadv2(2), RWF_NOWAIT); also where the filesystem cannot
  ///   tell. Needless for a file `isInMemory`, whose filesystem cannot tell either.
  /// - Returns: bytes; 0 at the end of the file.
  @unsafe
  public borrowing func read(
    into bytes: UnsafeMutableRawBufferPointer, at offset: Int, waits: Bool = true
  ) throws(Errno) -> Int {
    while true {
      let count =
        unsafe waits
        ? clinux_pread(rawValue, bytes.baseAddress, bytes.count, off_t(offset))
        : clinux_pread_nowait(rawValue, bytes.baseAddress, bytes.count, off_t(offset))
      switch count {
      case -Int(EINTR): continue
      case -Int(EOPNOTSUPP) where !waits, -Int(ENOSYS) where !waits: throw .wouldBlock
      default: return try check(count)
      }
    }
  }

  /// Whether the file is on tmpfs, ramfs or hugetlbfs: reading it waits for no storage.
  public var isInMemory: Bool { clinux_is_memory_file(rawValue) == 1 }

  /// Waits until data and metadata are on stable storage (fsync(2)).
  ///
  /// After an error the kernel may have dropped the data: write the file again, do not
  /// sync again.
  public borrowing func synchronize() throws(Errno) {
    _ = try retryingInterrupted { clinux_fsync(rawValue) }
  }

  /// Asks the kernel to begin writing a part to storage now, so that a later `synchronize` has
  /// less to wait for (sync_file_range(2)). A hint: nothing is promised, and errors are left to
  /// `synchronize`.
  public borrowing func beginWriteback(of range: Range<Int>) {
    _ = clinux_begin_writeback(rawValue, off_t(range.lowerBound), off_t(range.count))
  }

  /// Sets the length in bytes (ftruncate(2)); what is added is a hole.
  public borrowing func setLength(_ length: Int) throws(Errno) {
    _ = try retryingInterrupted { clinux_ftruncate(rawValue, off_t(length)) }
  }

  /// fstat(2).
  public var status: FileStatus {
    get throws(Errno) { try FileStatus(ofDescriptor: rawValue) }
  }

  /// The first byte of data at or after an offset (lseek(2), SEEK_DATA); `nil` when
  /// only a hole follows. Moves the file position, which is shared by duplicates.
  public borrowing func nextData(from offset: Int) throws(Errno) -> Int? {
    try seek(to: offset, whence: SEEK_DATA)
  }

  /// The first byte of a hole at or after an offset (lseek(2), SEEK_HOLE); the end of
  /// the file counts as one. `nil` past the end. Moves the file position.
  public borrowing func nextHole(from offset: Int) throws(Errno) -> Int? {
    try seek(to: offset, whence: SEEK_HOLE)
  }

  private borrowing func seek(to offset: Int, whence: CInt) throws(Errno) -> Int? {
    let found = clinux_lseek(rawValue, off_t(offset), whence)
    return found == -Int(ENXIO) ? nil : try check(found)
  }
}

extension FilePath {
  /// openat(2) with the path; the descriptor's number.
  func openAt(_ directory: CInt, flags: CInt, mode: UInt32 = 0) throws(Errno) -> Int {
    try retryingInterrupted {
      unsafe withPlatformString { name in
        unsafe clinux_openat(directory, name, flags, mode)
      }
    }
  }
}
