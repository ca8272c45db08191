// SPDX-License-Identifier: Apache-2.0

import CTestSupport
import Glibc
package import LinuxSystem
import Synchronization
package import SystemPackage

/// Huge pages of 2 MiB that a test can use up: a hugetlbfs of its own with a limit (`size=`). The
/// machine's pool has to have as many.
///
/// It is mounted nowhere, so nothing of it is left behind by a test that dies.
package final class SmallHugePagePool: Sendable {
  /// How many pages it has at most.
  package let pages: Int
  private let root: OwnedDescriptor
  /// Has the pages that are held, from its first on.
  private let ballast: MemoryFile
  private let held = Mutex(0)
  private let files = Atomic<Int>(0)

  /// Whether this process may make one (root), and the machine has a few huge pages.
  package static let isAvailable: Bool = {
    guard Host.hasHugePages(16) else { return false }
    return (try? SmallHugePagePool(pages: 1)) != nil
  }()

  package init(pages: Int) throws {
    let root = OwnedDescriptor(
      owning: try Self.checked(unsafe ctest_mount_hugetlbfs("\(pages * pageBytes)", "2M")))
    ballast = try Self.makeFile(in: root, name: "ballast", pages: pages)
    self.root = root
    self.pages = pages
  }

  private static func checked(_ result: CInt) throws(Errno) -> CInt {
    guard result >= 0 else { throw Errno(rawValue: -result) }
    return result
  }

  private static func makeFile(
    in root: borrowing OwnedDescriptor, name: String, pages: Int
  ) throws -> MemoryFile {
    let made = OwnedDescriptor(
      owning: try checked(unsafe ctest_make_file(root.rawValue, name)))
    try made.setLength(pages * pageBytes)
    return MemoryFile(adopting: made, length: pages * pageBytes, pageSize: .size2MiB)
  }

  /// A file of so many pages, none of which is there yet.
  package func makeFile(pages: Int) throws -> MemoryFile {
    let number = files.wrappingAdd(1, ordering: .relaxed).newValue
    return try Self.makeFile(in: root, name: "file\(number)", pages: pages)
  }

  /// Maps all of a new file without setting pages aside (MAP_NORESERVE). Memory that is mapped
  /// `.private` is what Firecracker has: its pages are its own, and come from this pool.
  package func makeMapping(pages: Int, sharing: MappingSharing) throws -> Mapping {
    let file = try makeFile(pages: pages)
    return try Mapping(of: file.descriptor, length: file.length, sharing: sharing)
  }

  /// What another process of this user opens to have a file (`FakeFirecracker.Memory.file`), as
  /// long as the file is kept here.
  package static func path(of file: borrowing MemoryFile) -> FilePath {
    FilePath("/proc/\(getpid())/fd/\(file.descriptor.rawValue)")
  }

  /// Pages that are neither in use nor held.
  package var freePages: Int { Int(ctest_free_blocks(root.rawValue)) }

  /// Takes pages away: all that are free when no number is given.
  package func hold(_ count: Int? = nil) throws {
    try held.withLock { held in
      for _ in 0..<(count ?? freePages) {
        try ballast.descriptor.allocate(offset: held * pageBytes, length: pageBytes)
        held += 1
      }
    }
  }

  /// Gives back pages that were held: all when no number is given.
  package func free(_ count: Int? = nil) throws {
    try held.withLock { held in
      for _ in 0..<min(count ?? held, held) {
        held -= 1
        try ballast.punchHole(offset: held * pageBytes, length: pageBytes)
      }
    }
  }
}

private let pageBytes = PageSize.size2MiB.bytes
