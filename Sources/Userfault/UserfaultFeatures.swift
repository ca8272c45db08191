// SPDX-License-Identifier: Apache-2.0

internal import CLinux

/// What a userfaultfd can do, negotiated once with UFFDIO_API
/// (ioctl_userfaultfd(2), include/uapi/linux/userfaultfd.h).
///
/// Bits that this version does not know are kept.
public struct UserfaultFeatures: OptionSet, Hashable, Sendable, CustomStringConvertible {
  /// The kernel's bits.
  public let rawValue: UInt64

  /// Wraps the kernel's bits.
  public init(rawValue: UInt64) { self.rawValue = rawValue }

  private init(_ bit: CInt) { rawValue = UInt64(bit) }

  /// Write-protect faults are reported (Linux 5.7).
  public static let writeProtectFaults = Self(UFFD_FEATURE_PAGEFAULT_FLAG_WP)
  /// fork(2) raises an event with a descriptor for the child; needs CAP_SYS_PTRACE.
  public static let forkEvents = Self(UFFD_FEATURE_EVENT_FORK)
  /// mremap(2) raises an event.
  public static let remapEvents = Self(UFFD_FEATURE_EVENT_REMAP)
  /// MADV_DONTNEED and MADV_REMOVE raise an event.
  public static let removeEvents = Self(UFFD_FEATURE_EVENT_REMOVE)
  /// MISSING on hugetlbfs.
  public static let missingHugetlbfs = Self(UFFD_FEATURE_MISSING_HUGETLBFS)
  /// MISSING on tmpfs and memfd.
  public static let missingShmem = Self(UFFD_FEATURE_MISSING_SHMEM)
  /// munmap(2) raises an event.
  public static let unmapEvents = Self(UFFD_FEATURE_EVENT_UNMAP)
  /// A fault raises SIGBUS instead of an event.
  public static let signalInsteadOfEvent = Self(UFFD_FEATURE_SIGBUS)
  /// Page-fault events carry the thread id.
  public static let threadID = Self(UFFD_FEATURE_THREAD_ID)
  /// MINOR on hugetlbfs (Linux 5.13).
  public static let minorHugetlbfs = Self(UFFD_FEATURE_MINOR_HUGETLBFS)
  /// MINOR on tmpfs and memfd (Linux 5.14).
  public static let minorShmem = Self(UFFD_FEATURE_MINOR_SHMEM)
  /// Page-fault events carry the address to the byte (Linux 5.18).
  public static let exactAddress = Self(UFFD_FEATURE_EXACT_ADDRESS)
  /// WP on tmpfs and hugetlbfs (Linux 5.19).
  public static let writeProtectShmemHugetlbfs = Self(UFFD_FEATURE_WP_HUGETLBFS_SHMEM)
  /// WP also covers pages that are not there yet (Linux 6.4).
  public static let writeProtectUnpopulated = Self(UFFD_FEATURE_WP_UNPOPULATED)
  /// UFFDIO_POISON (Linux 6.6).
  public static let poison = Self(UFFD_FEATURE_POISON)
  /// WP faults are resolved by the kernel and only recorded (Linux 6.7).
  public static let writeProtectAsync = Self(UFFD_FEATURE_WP_ASYNC)
  /// UFFDIO_MOVE (Linux 6.8).
  public static let move = Self(UFFD_FEATURE_MOVE)
  /// RWP: traps reads and writes of present pages (Linux 7.3).
  public static let readWriteProtect = Self(UFFD_FEATURE_RWP)
  /// RWP faults are resolved by the kernel and only recorded (Linux 7.3).
  public static let readWriteProtectAsync = Self(UFFD_FEATURE_RWP_ASYNC)

  /// The kernel's names of the bits, in their order.
  private static let names = [
    "PAGEFAULT_FLAG_WP", "EVENT_FORK", "EVENT_REMAP", "EVENT_REMOVE", "MISSING_HUGETLBFS",
    "MISSING_SHMEM", "EVENT_UNMAP", "SIGBUS", "THREAD_ID", "MINOR_HUGETLBFS", "MINOR_SHMEM",
    "EXACT_ADDRESS", "WP_HUGETLBFS_SHMEM", "WP_UNPOPULATED", "POISON", "WP_ASYNC", "MOVE", "RWP",
    "RWP_ASYNC",
  ]

  /// The set's members by the kernel's names without UFFD_FEATURE_; a bit without a
  /// name appears as "bit N".
  public var kernelNames: [String] { flagNames(rawValue, Self.names) }

  /// The names, separated by blanks.
  public var description: String { kernelNames.joined(separator: " ") }
}

/// The names of the set bits; a bit without a name appears as "bit N".
func flagNames(_ bits: UInt64, _ names: [String]) -> [String] {
  (0..<64).filter { bits & (1 << UInt64($0)) != 0 }.map { bit in
    bit < names.count && !names[bit].isEmpty ? names[bit] : "bit \(bit)"
  }
}
