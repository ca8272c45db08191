// SPDX-License-Identifier: Apache-2.0

// What goes to the object, or to a mapping, beside userfaultfd; and stage 2.
extension Model {
  // MARK: - pwrite(2)

  mutating func write(_ first: Int, _ count: Int, _ tag: UInt64, _ readable: Int) -> Outcome {
    let pages = first..<(first + count)
    switch setup.memory {
    case .anonymous: return .failed(.ENODEV)
    case .hugetlb:
      // hugetlbfs_file_operations has no write_iter.
      return .failed(.EINVAL)
    case .tmpfsShared, .tmpfsPrivate:
      // shmem_file_write_iter(): present or not; page tables and protections stay. Not
      // past the end, where it would grow the object.
      if pages.upperBound > setup.objectPages || readable < count { return .failed(.EINVAL) }
      for page in pages { cache[page] = .uptodate(tag + UInt64(page - first)) }
      return .done(UInt64(count))
    case .guestMemfd, .guestMemfdPrivate:
      return writeToGuestMemfd(pages, tag, readable)
    }
  }

  private mutating func writeToGuestMemfd(
    _ pages: Range<Int>, _ tag: UInt64, _ readable: Int
  ) -> Outcome {
    // An anonymous inode without FMODE_PWRITE: ksys_pwrite64(). Also where it was made
    // without the flag, which private memory cannot have.
    if setup.kernel.guestMemfdWrite == .none || setup.memory == .guestMemfdPrivate {
      return .failed(.ESPIPE)
    }
    if pages.upperBound > setup.objectPages { return .failed(.EINVAL) }
    for page in pages {
      let done = page - pages.lowerBound
      var errno: ModelErrno?
      if setup.kernel.guestMemfdWrite == .absentPagesOnly, cache[page] != .absent {
        errno = .EEXIST
      } else if done >= readable {
        errno = .EFAULT
        // v7 allocated before it copied, and left a zero page behind.
        if setup.kernel.guestMemfdWrite == .overwriting, cache[page] == .absent {
          cache[page] = .uptodate(0)
        }
      }
      if let errno { return done == 0 ? .failed(errno) : .done(UInt64(done)) }
      cache[page] = .uptodate(tag + UInt64(done))
    }
    return .done(UInt64(pages.count))
  }

  // MARK: - fallocate(2)

  mutating func allocate(_ first: Int, _ count: Int) -> Outcome {
    let pages = first..<(first + count)
    switch setup.memory {
    case .anonymous: return .failed(.ENODEV)
    case .guestMemfd, .guestMemfdPrivate:
      // kvm_gmem_allocate(): the size first; the folios are not up to date.
      if pages.upperBound > setup.objectPages { return .failed(.EINVAL) }
      for page in pages where cache[page] == .absent { cache[page] = .allocated }
    case .tmpfsShared, .tmpfsPrivate:
      // shmem_fallocate(): new folios are not cleared; one that an earlier call made is
      // (shmem_get_folio_gfp(), "must initialize it now").
      for page in pages where page < setup.objectPages {
        if cache[page] == .absent { cache[page] = .allocated } else { makeUptodate(page) }
      }
    case .hugetlb:
      // hugetlbfs_fallocate(): new folios are zeroed.
      for page in pages where page < setup.objectPages && cache[page] == .absent {
        cache[page] = .uptodate(0)
      }
    }
    return .done(0)
  }

  mutating func punchHole(_ first: Int, _ count: Int) -> Outcome {
    if setup.memory == .anonymous { return .failed(.ENODEV) }
    for page in first..<(first + count) {
      if setup.memory.isGuestMemfd {
        truncate(page)
      } else {
        for mapping in mappings.indices { zap(mapping, page, copiesToo: setup.memory == .hugetlb) }
      }
      if page < setup.objectPages {
        cache[page] = .absent
        // kvm_gmem_invalidate_start() takes the page from the guest.
        stageTwo[page] = false
      }
    }
    return .done(0)
  }

  /// kvm_gmem_punch_hole() leaves the user mappings to truncate_inode_pages_range(): where a
  /// folio is mapped, unmap_mapping_folio() clears that page in all mappings, and
  /// ZAP_FLAG_DROP_MARKER takes protection markers along. Poison stays (should_zap_cows()).
  private mutating func truncate(_ page: Int) {
    let isMapped = mappings.contains { mapping in
      if case .mapped = mapping.table[page] { true } else { false }
    }
    guard isMapped else { return }
    for mapping in mappings.indices where mappings[mapping].table[page] != .poison {
      mappings[mapping].table[page] = .none
    }
  }

  // MARK: - madvise(2)

  mutating func dontNeed(_ span: Span) -> Outcome {
    for page in span.pages { zap(span.mapping, page, copiesToo: true) }
    return .done(0)
  }

  /// zap_pte_range(), mm/memory.c; __unmap_hugepage_range(), mm/hugetlb.c. Private copies
  /// and poison survive a hole (should_zap_cows()); a protected page of a file leaves a
  /// marker (zap_install_uffd_wp_if_needed()).
  private mutating func zap(_ mapping: Int, _ page: Int, copiesToo: Bool) {
    let isProtected = mappings[mapping].modes[page].contains(.writeProtect)
    switch mappings[mapping].table[page] {
    case .none: break
    case .poison:
      if copiesToo { mappings[mapping].table[page] = .none }
    case .protectedMarker:
      if setup.memory == .anonymous { mappings[mapping].table[page] = .none }
    case .mapped(.copy, _) where !copiesToo: break
    case .mapped(_, let protection):
      let leavesMarker =
        switch setup.memory {
        case .anonymous: false
        // __unmap_hugepage_range() looks at the bit only.
        case .hugetlb: protection != .none
        default: isProtected && protection != .none
        }
      mappings[mapping].table[page] = leavesMarker ? .protectedMarker : .none
    }
  }

  // MARK: - Stage 2

  /// A vCPU whose slot is bound to the guest_memfd: kvm_gmem_get_pfn() takes the folio
  /// from the file, no user page table is looked at, and userfaultfd does not see it.
  mutating func vcpuTouch(_ page: Int, _ access: Access) -> Outcome {
    guard setup.memory.isGuestMemfd else { return .failed(.EINVAL) }
    if page >= setup.objectPages { return .memoryFaultExit(userfault: false) }
    if !stageTwo[page] {
      // The bitmap is looked at when a page is mapped, not afterwards.
      if userfaultBitmap[page] { return .memoryFaultExit(userfault: true) }
      if cache[page] == .absent { cache[page] = .uptodate(0) }
      makeUptodate(page)
      stageTwo[page] = true
    }
    switch access {
    case .write(let value):
      cache[page] = .uptodate(value)
      return .value(value)
    case .read:
      if case .uptodate(let value) = cache[page] { return .value(value) }
      return .value(staleContent)
    }
  }
}
