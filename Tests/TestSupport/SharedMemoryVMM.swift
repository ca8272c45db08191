// SPDX-License-Identifier: Apache-2.0

package import LinuxSystem
import SystemPackage
package import Userfault

/// A VMM in this process whose memory is a memory file: registered MISSING and MINOR, for a service
/// that fills it through the file.
package final class SharedMemoryVMM: Sendable {
  /// Not sealed.
  package let file: MemoryFile
  package let userfaultfd: Userfaultfd
  private let mapping: Mapping

  /// - Parameters:
  ///   - pages: of its memory.
  ///   - offset: pages of the file before those of its memory.
  ///   - pool: where a file of 2 MiB pages comes from, if not from the machine's pool.
  package init(
    pages: Int, pageSize: PageSize = .size4KiB, offset: Int = 0, pool: SmallHugePagePool? = nil
  ) throws {
    let unit = pageSize.bytes
    let file =
      try pool?.makeFile(pages: offset + pages)
      ?? MemoryFile(name: "vmm-memory", length: (offset + pages) * unit, pageSize: pageSize)
    let mapping = try Mapping(
      of: file.descriptor, offset: offset * unit, length: pages * unit, sharing: .shared)
    let userfaultfd = try Userfaultfd(
      requiring: [.removeEvents],
      wanting: [.missingShmem, .minorShmem, .missingHugetlbfs, .minorHugetlbfs])
    try userfaultfd.register(mapping.range, modes: [.missing, .minor])
    self.file = file
    self.mapping = mapping
    self.userfaultfd = userfaultfd
  }

  deinit {
    // Whoever serves it may be gone, and unmapping would wait for the event to be read.
    try? userfaultfd.unregister(mapping.range)
  }

  package var range: HostRange { mapping.range }

  /// Gives bytes back, as a balloon does with memory that is shared (MADV_REMOVE). Returns when
  /// the service has read of it.
  package func remove(offset: Int, length: Int) throws {
    try mapping.advise(.remove, offset: offset, length: length)
  }
}
