// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import SystemPackage

/// What can never be done to a memory file any more (F_ADD_SEALS, fcntl(2)).
public struct MemoryFileSeals: OptionSet, Sendable, Hashable {
  /// The kernel's bits, also those that have no name here.
  public let rawValue: Int
  /// Takes the kernel's bits.
  public init(rawValue: Int) { self.rawValue = rawValue }

  /// F_SEAL_SEAL: no more seals.
  public static let seals = Self(rawValue: 0x01)
  /// F_SEAL_SHRINK: it does not become shorter.
  public static let shrinking = Self(rawValue: 0x02)
  /// F_SEAL_GROW: it does not become longer.
  public static let growing = Self(rawValue: 0x04)
  /// F_SEAL_WRITE: its content stays.
  public static let writing = Self(rawValue: 0x08)
  /// F_SEAL_FUTURE_WRITE: its content stays, but for mappings that were there before.
  public static let futureWriting = Self(rawValue: 0x10)
}

/// What the kernel says of a file that another process calls its memory.
public struct ReceivedMemoryFile: Sendable, Hashable {
  /// The unit of its page cache; `nil` when it is neither on tmpfs nor on hugetlbfs.
  public let pageSize: PageSize?
  /// Its seals; none where it cannot have any.
  public let seals: MemoryFileSeals
  /// Whether the descriptor is for reading and writing.
  public let isWritable: Bool
  /// Whether what is written goes to its end, wherever it is to go (O_APPEND, pwrite(2)).
  public let isAppending: Bool
}

extension OwnedDescriptor {
  /// Looks at a file that came from another process.
  public var receivedMemoryFile: ReceivedMemoryFile {
    get throws(Errno) {
      let bytes = try check(clinux_memory_page_size(rawValue))
      let seals = clinux_get_seals(rawValue)
      let flags = CInt(try check(clinux_status_flags(rawValue)))
      return ReceivedMemoryFile(
        pageSize: PageSize(rawValue: bytes), seals: MemoryFileSeals(rawValue: max(0, seals)),
        isWritable: flags & O_ACCMODE == O_RDWR, isAppending: flags & O_APPEND != 0)
    }
  }
}
