// SPDX-License-Identifier: Apache-2.0

internal import LinuxSystem
internal import SystemPackage

/// Tells a userfaultfd and a memfd from every other descriptor, by what the kernel says without
/// asking what is behind it: fstat(2), fstatfs(2) and close(2) of a file of FUSE or NFS wait for its
/// server, close(2) of a socket for its peer (SO_LINGER, socket(7)).
struct DescriptorKinds: Sendable {
  /// The mounts of memfds, which have no place in any tree: one for tmpfs, and one of hugetlbfs for
  /// each size of pages.
  private let mounts: Set<String>

  static let ofThisKernel = DescriptorKinds()

  private init() {
    let sizes: [PageSize] = [.size4KiB, .size2MiB, .size1GiB]
    mounts = Set(
      sizes.compactMap { size in
        guard let file = try? MemoryFile(name: "faultline-kind", length: size.bytes, pageSize: size)
        else {
          return nil
        }
        return Self.mount(of: file.descriptor)
      })
  }

  func has(_ number: CInt) -> Bool {
    let descriptor = OwnedDescriptor(owning: number)
    let isOne =
      (try? descriptor.kernelName) == "anon_inode:[userfaultfd]"
      || Self.mount(of: descriptor).map(mounts.contains) == true
    // It stays its owner's.
    _ = descriptor.release()
    return isOne
  }

  /// "mnt_id" of /proc/self/fdinfo (proc(5)).
  private static func mount(of descriptor: borrowing OwnedDescriptor) -> String? {
    (try? descriptor.kernelInformation)?.split(separator: "\n")
      .first { $0.hasPrefix("mnt_id:") }.map { $0.dropFirst(7).filter(\.isNumber) }
  }
}
