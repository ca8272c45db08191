// SPDX-License-Identifier: Apache-2.0

internal import LinuxSystem
internal import SystemPackage
internal import Userfault

/// What an answer of the kernel proves about the page that was asked for. The table in
/// docs/pager.md has the reasons; only what is proven changes a page's state.
enum Finding: Hashable {
  /// What was asked for. Its waiters are awake.
  case done
  /// Something is mapped there, or in the page cache of shared memory. Its waiters sleep.
  case there
  /// Nothing is proven: there is no memory for it now, and the page is as it was.
  case shortage(Errno)
  /// Nothing is proven: an event stands before it.
  case changing
  /// CONTINUE: the page cache does not have the page.
  case uncached
  /// No such range is registered with this userfaultfd: unmapped, or its owner gave it up.
  case unregistered
  /// The address space is gone.
  case noGuest
  /// Nothing is proven, and trying again would not help.
  case impossible(Errno)

  /// What was asked.
  enum Call: CaseIterable {
    case copy, zeropage, `continue`, poison
    /// Putting a page into the page cache beside the mapping.
    case write
  }

  /// - Parameters:
  ///   - resolution: of one page.
  ///   - pageSize: of the memory. Pages of more than 4 KiB are hugetlbfs.
  init(_ resolution: Resolution, of call: Call, on pageSize: PageSize) {
    switch resolution.obstacle {
    case nil: self = .done
    case .alreadyPresent:
      // hugetlbfs gives this answer also where it has no page to fill: the pool is empty, or the
      // limit of a mount or a cgroup reached (mm/hugetlb.c, hugetlb_mfill_atomic_pte).
      self = call == .copy && pageSize != .size4KiB ? .shortage(.fileExists) : .there
    case .mappingChanging, .partial: self = .changing
    case .notRegistered: self = .unregistered
    case .processGone: self = .noGuest
    case .absent: self = call == .continue ? .uncached : .impossible(.badAddress)
    case .failed(.noMemory): self = .shortage(.noMemory)
    case .failed(.noSpace): self = .shortage(.noSpace)
    case .failed(let errno): self = .impossible(errno)
    }
  }
}

extension Finding {
  /// Why a page has no content after its time is over.
  static func reason(_ errno: Errno, _ pageSize: PageSize) -> String {
    switch (errno, pageSize) {
    case (_, .size4KiB):
      "there is no memory for it (\(errno)): the machine, its file or the memory cgroup of the "
        + "VMM is full"
    default:
      "there is no free page of \(pageSize) for it (\(errno)): the pool is empty, or the limit of "
        + "its file system or of a hugetlb cgroup is reached"
    }
  }
}
