// SPDX-License-Identifier: Apache-2.0

public import LinuxSystem
public import SystemPackage

/// Fills the page cache of a shared memory object without going through the mapping
/// that userfaultfd watches.
///
/// On tmpfs it is pwrite(2): no fault, and a full tmpfs is an error instead of a
/// SIGBUS. hugetlbfs has no write(2): there the pages are allocated first, then
/// copied through an alias mapping.
@safe
public struct PageCacheWriter: ~Copyable, Sendable {
  private enum Way: ~Copyable, Sendable {
    case file(OwnedDescriptor)
    case alias(Alias)
    case handed(HandedMemoryFile, start: Int)
  }

  /// An object of hugetlbfs and a mapping of all of it.
  private struct Alias: ~Copyable, Sendable {
    let descriptor: OwnedDescriptor
    let mapping: Mapping
  }

  private let way: Way

  /// A writer of its own for an object of this process; the descriptor is duplicated.
  public init(_ file: borrowing MemoryFile) throws(Errno) {
    let descriptor = try file.descriptor.duplicate()
    if file.pageSize == .size4KiB {
      way = .file(descriptor)
    } else {
      let mapping = try Mapping(of: file)
      way = .alias(Alias(descriptor: descriptor, mapping: mapping))
    }
  }

  /// A writer for the part of another process's file that begins at an offset.
  public init(_ file: HandedMemoryFile, offset: Int) { way = .handed(file, start: offset) }

  /// Puts whole pages into the page cache. Nothing of it is visible through a mapping
  /// registered MINOR until UFFDIO_CONTINUE.
  ///
  /// After an error the pages may exist with any content: write them again before
  /// anyone is woken.
  /// - Parameters:
  ///   - bytes: whole pages of the object.
  ///   - offset: bytes into the object, or into the part of it.
  @unsafe
  public borrowing func write(_ bytes: UnsafeRawBufferPointer, at offset: Int) throws(Errno) {
    guard let base = bytes.baseAddress else { return }
    switch way {
    case .file(let descriptor):
      try unsafe descriptor.writeAll(bytes, at: offset)
    case .alias(let alias):
      try alias.descriptor.allocate(offset: offset, length: bytes.count)
      // SAFETY: allocate() made the pages, so the copy cannot raise SIGBUS; the range
      // lies inside the object, which the alias maps whole.
      precondition(offset >= 0 && offset + bytes.count <= alias.mapping.length)
      unsafe (alias.mapping.pointer + offset).copyMemory(from: base, byteCount: bytes.count)
    case .handed(let file, let start):
      try unsafe file.write(bytes, at: start + offset)
    }
  }

  /// Takes whole pages out of the page cache: they are zero then, and take no memory.
  ///
  /// Needs the file's lock, which its owner may hold for as long as it likes.
  public borrowing func discard(offset: Int, length: Int) throws(Errno) {
    switch way {
    case .file(let descriptor): try descriptor.punchHole(offset: offset, length: length)
    case .alias(let alias): try alias.descriptor.punchHole(offset: offset, length: length)
    case .handed(let file, let start): try file.discard(offset: start + offset, length: length)
    }
  }

  /// Whether the file is another process's. Then UFFDIO_COPY goes first, which takes no lock of
  /// the file, and has that process's memory cgroup pay for the page.
  public var isHanded: Bool {
    switch way {
    case .handed: true
    case .file: false
    case .alias: false
    }
  }
}
