// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import GuestMemoryModel
public import LinuxSystem
public import SystemPackage

/// The object behind the mappings: a memfd, or a descriptor that the caller brings.
public final class MemoryObject {
  private let descriptor: OwnedDescriptor
  private let isHuge: Bool
  /// A mapping that nobody touches, to ask for the page cache of a guest_memfd, which has
  /// neither SEEK_DATA nor a block count.
  private let window: Mapping?

  /// A descriptor of a guest_memfd of that many bytes.
  public init(adopting descriptor: consuming OwnedDescriptor, length: Int) throws(Errno) {
    window = try Mapping(of: descriptor, length: length, sharing: .shared)
    self.descriptor = descriptor
    isHuge = false
  }

  init(length: Int, pageBytes: Int) throws(Errno) {
    isHuge = pageBytes != PageSize.size4KiB.bytes
    window = nil
    let file = try MemoryFile(
      name: "faultline-model", length: length, pageSize: isHuge ? .size2MiB : .size4KiB)
    descriptor = try file.descriptor.duplicate()
  }

  func map(length: Int, isPrivate: Bool) throws(Errno) -> Mapping {
    try Mapping(of: descriptor, length: length, sharing: isPrivate ? .private : .shared)
  }

  /// Sets the length, so that the mappings reach beyond the end, and empties the object.
  func cut(to length: Int) throws(Errno) {
    switch window {
    case .some: return
    case .none: break
    }
    try descriptor.setLength(length)
    let mode = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
    _ = try check(clinux_fallocate(descriptor.rawValue, mode, 0, off_t(length)))
  }

  func perform(
    _ operation: Operation, pageBytes: Int, source: SourcePages
  ) throws(Errno) -> Outcome {
    switch operation {
    case .write(let first, let count, let tag, let readable):
      let bytes = unsafe source.fill(
        count: count, pageBytes: pageBytes, tag: tag, readable: readable)
      // SAFETY: the source has that many pages; what follows `readable` is the kernel's to
      // refuse.
      let written = try check(
        unsafe clinux_pwrite(
          descriptor.rawValue, bytes, count * pageBytes, off_t(first * pageBytes)))
      return .done(UInt64(written / pageBytes))
    case .allocate(let first, let count):
      _ = try check(
        clinux_fallocate(
          descriptor.rawValue, FALLOC_FL_KEEP_SIZE, off_t(first * pageBytes),
          off_t(count * pageBytes)))
      return .done(0)
    case .punchHole(let first, let count):
      _ = try check(
        clinux_fallocate(
          descriptor.rawValue, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
          off_t(first * pageBytes), off_t(count * pageBytes)))
      return .done(0)
    default:
      return try inspect(pageBytes)
    }
  }

  /// SEEK_DATA finds pages that are up to date; the block count is that of all pages.
  private func inspect(_ pageBytes: Int) throws(Errno) -> Outcome {
    switch window {
    case .some(let window):
      let pages = try window.residentPages()
      let uptodate = pages.indices.filter { pages[$0] }.reduce(0) { $0 | UInt64(1) << $1 }
      return .pages(uptodate, count: uptodate.nonzeroBitCount)
    case .none: break
    }
    let count = try descriptor.status.allocatedBytes / pageBytes
    // hugetlbfs says that all is data.
    if isHuge { return .pages(0, count: count) }
    var bits: UInt64 = 0
    var offset = 0
    while let data = try descriptor.nextData(from: offset) {
      bits |= 1 << UInt64(data / pageBytes)
      offset = data + pageBytes
    }
    return .pages(bits, count: count)
  }
}

/// Pages to copy from. Made once: the pages are there, so that no copy takes the slow
/// way around a fault in its source.
public final class SourcePages {
  private let mapping: Mapping
  private let capacity: Int

  /// Room for as many pages of the given size as the largest span has.
  public init(pages: Int, pageBytes: Int) throws(Errno) {
    capacity = pages * pageBytes
    // The last page stays unreadable: punched out.
    mapping = try Mapping(anonymous: capacity + PageSize.size4KiB.bytes)
    try mapping.advise(.populateWrite, offset: 0, length: capacity)
    try mapping.punchOut(offset: capacity, length: PageSize.size4KiB.bytes)
  }

  /// Puts the values of the pages into place; after page `readable` nothing can be read.
  func fill(
    count: Int, pageBytes: Int, tag: UInt64, readable: Int? = nil
  ) -> UnsafeRawPointer {
    let start = capacity - (readable ?? capacity / pageBytes) * pageBytes
    for page in 0..<min(count, readable ?? count) {
      // SAFETY: start + (page + 1) * pageBytes <= capacity.
      unsafe mapping.pointer.storeBytes(
        of: tag + UInt64(page), toByteOffset: start + page * pageBytes, as: UInt64.self)
    }
    return unsafe UnsafeRawPointer(mapping.pointer + start)
  }
}
