// SPDX-License-Identifier: Apache-2.0

internal import GuestMemory
internal import LinuxSystem
internal import Pager
internal import SystemPackage

/// The memory files of a hand-over, checked: what a VMM may do to them later must not harm the
/// service.
enum HandedMemory {
  /// The files that regions with the mode `.minor` are filled through, in the order in which they
  /// came; `nil` for others, which are closed.
  ///
  /// - Parameter descriptors: those of kind `memory`.
  static func files(
    _ descriptors: consuming DescriptorList, of regions: [HandedRegion]
  ) throws(HandoverError) -> [HandedMemoryFile?] {
    var descriptors = descriptors
    var files: [HandedMemoryFile?] = []
    while let descriptor = descriptors.takeFirst() {
      files.append(try file(descriptor, number: files.count, regions))
    }
    return files
  }

  private static func file(
    _ descriptor: consuming OwnedDescriptor, number: Int, _ regions: [HandedRegion]
  ) throws(HandoverError) -> HandedMemoryFile? {
    let status: FileStatus
    let file: ReceivedMemoryFile
    do throws(Errno) {
      // Its length after its seals: one that may not shrink any more keeps it.
      file = try descriptor.receivedMemoryFile
      status = try descriptor.status
    } catch {
      throw HandoverError(
        .inputOutput, "memory file \(number) cannot be looked at", errno: error)
    }
    guard status.isRegular else {
      throw HandoverError(.invalidDescriptor, "memory file \(number) is no memory file")
    }
    for (index, region) in regions.enumerated() {
      guard let memory = region.memory, memory.file == number else { continue }
      guard memory.offset <= status.length, region.host.length <= status.length - memory.offset
      else {
        throw HandoverError(
          .invalidRegions, "it passes the end of memory file \(number)", region: index)
      }
    }
    let filled = regions.filter { $0.mode == .minor && $0.memory?.file == number }
    guard !filled.isEmpty else { return nil }
    let pageSize = try check(file, number: number)
    for (index, region) in regions.enumerated() where region.mode == .minor {
      guard region.memory?.file != number || region.pageSize == pageSize else {
        throw HandoverError(
          .invalidRegions,
          "its page size is \(region.pageSize), and that of memory file \(number) \(pageSize)",
          region: index)
      }
    }
    let used = try part(of: number, filled)
    do throws(Errno) {
      return try HandedMemoryFile(descriptor, pageSize: pageSize, used: used)
    } catch .permissionDenied {
      throw HandoverError(
        .invalidDescriptor,
        "memory file \(number) cannot be opened for writing: its mode forbids it to the service")
    } catch {
      throw HandoverError(.inputOutput, "memory file \(number) cannot be mapped", errno: error)
    }
  }

  /// What the service writes to must be a memfd that stays as long as it is; its page size.
  private static func check(
    _ file: ReceivedMemoryFile, number: Int
  ) throws(HandoverError) -> PageSize {
    func refused(_ reason: String) -> HandoverError {
      HandoverError(.invalidDescriptor, "memory file \(number) \(reason)")
    }
    guard let pageSize = file.pageSize else {
      throw refused("is neither on tmpfs nor on hugetlbfs: mode minor needs a memfd")
    }
    guard file.isWritable else {
      throw refused("is not open for reading and writing: hand over what memfd_create gave")
    }
    guard !file.isAppending else {
      throw refused("has O_APPEND: what is written would go to its end and not to its place")
    }
    guard file.seals.contains(.shrinking) else {
      throw refused(
        "can be shortened: make it with memfd_create and MFD_ALLOW_SEALING, and add F_SEAL_SHRINK "
          + "once it has its length")
    }
    guard file.seals.isDisjoint(with: [.writing, .futureWriting]) else {
      throw refused("is sealed against writing: leave out F_SEAL_WRITE and F_SEAL_FUTURE_WRITE")
    }
    return pageSize
  }

  /// The bytes from the first to the last that regions map. The service maps them, so they may not
  /// be far apart.
  private static func part(
    of number: Int, _ regions: [HandedRegion]
  ) throws(HandoverError) -> Range<Int> {
    let starts = regions.compactMap(\.memory?.offset)
    let ends = regions.compactMap { region in region.memory.map { $0.offset + region.host.length } }
    guard let start = starts.min(), let end = ends.max() else { return 0..<0 }
    let length = regions.reduce(0) { $0 + $1.host.length }
    guard end - start <= 2 * length + HandoverLimits.memoryGap else {
      throw HandoverError(
        .limitExceeded, "the parts of memory file \(number) that regions map lie too far apart")
    }
    return start..<end
  }
}
