// SPDX-License-Identifier: Apache-2.0

// A touch through a mapping: the page-fault path of mm/memory.c, with that of the kind
// of memory below it.
extension Model {
  mutating func touch(_ mapping: Int, _ page: Int, _ access: Access) -> Outcome {
    // Each pass is one fault; the processor retries until the access goes through.
    while true {
      switch mappings[mapping].table[page] {
      case .poison:
        // handle_pte_marker(), mm/memory.c: PTE_MARKER_POISONED is VM_FAULT_HWPOISON.
        return .busError
      case .none, .protectedMarker:
        if let outcome = faultOnEmptyEntry(mapping, page, access) { return outcome }
      case .mapped(let target, let protection):
        guard case .write(let value) = access else { return .value(read(target, page)) }
        if let outcome = faultOnProtectedEntry(mapping, page, protection) { return outcome }
        // Only before 7.3, where a registration can drop WP: hugetlb_fault() sees no WP to
        // report, and hugetlb_wp() leaves a page with the bit to hugetlb_fault().
        if setup.memory == .hugetlb, protection == .armed { return .neverEnds }
        store(value, mapping, page, target)
        return .value(value)
      }
    }
  }

  private func read(_ target: TableEntry.Target, _ page: Int) -> UInt64 {
    switch target {
    case .zero: 0
    case .copy(let value): value
    case .cache:
      switch cache[page] {
      case .uptodate(let value): value
      case .allocated: staleContent
      case .absent: preconditionFailure("a page table maps a folio that is gone")
      }
    }
  }

  private mutating func store(
    _ value: UInt64, _ mapping: Int, _ page: Int, _ target: TableEntry.Target
  ) {
    guard case .mapped(_, var protection) = mappings[mapping].table[page] else { return }
    let isPrivate = mappings[mapping].setup.isPrivate
    if protection == .armed {
      // Not registered WP (any more): do_wp_page() does not look at the bit. Reusing the
      // page keeps the bit and makes the entry writable (wp_page_reuse()), copying drops
      // it (wp_page_copy()).
      let reuses = target == .cache ? !isPrivate : target != .zero
      protection = reuses ? .stale : .none
    } else if isPrivate, target == .cache || target == .zero {
      protection = .none
    }
    if !isPrivate, target == .cache {
      cache[page] = .uptodate(value)
      mappings[mapping].table[page] = .mapped(.cache, protection)
    } else {
      // do_wp_page() -> wp_page_copy(): the object keeps its page.
      mappings[mapping].table[page] = .mapped(.copy(value), protection)
    }
  }

  /// do_wp_page(), mm/memory.c and hugetlb_fault(), mm/hugetlb.c: the event comes before
  /// any copy.
  private func faultOnProtectedEntry(
    _ mapping: Int, _ page: Int, _ protection: TableEntry.Protection
  ) -> Outcome? {
    guard protection == .armed, mappings[mapping].modes[page].contains(.writeProtect) else {
      return nil
    }
    return .waits(FaultEvent(mapping: mapping, page: page, flags: [.write, .writeProtect]))
  }

  // MARK: - An empty entry

  /// Fills the entry, or says why not.
  private mutating func faultOnEmptyEntry(
    _ mapping: Int, _ page: Int, _ access: Access
  ) -> Outcome? {
    let modes = mappings[mapping].modes[page]
    let wasMarked = mappings[mapping].table[page] == .protectedMarker
    // pte_marker_handle_uffd_wp(), mm/memory.c: a marker without WP is dropped.
    if wasMarked, !modes.contains(.writeProtect), setup.memory != .hugetlb {
      mappings[mapping].table[page] = .none
    }
    // hugetlb_no_page() takes the marker's bit over without a look at the registration.
    let keepsProtection = modes.contains(.writeProtect) || setup.memory == .hugetlb
    let protection: TableEntry.Protection = wasMarked && keepsProtection ? .armed : .none

    if setup.memory == .anonymous {
      // do_anonymous_page(): a read maps the zero page.
      if modes.contains(.missing) { return waits(mapping, page, access, []) }
      let target: TableEntry.Target = access.isWrite ? .copy(0) : .zero
      mappings[mapping].table[page] = .mapped(target, protection)
      return nil
    }
    // do_read_fault(): neighbours first, even of a page beyond the end.
    if !access.isWrite { faultAround(mapping, page) }
    if let outcome = faultBeforeLookup(mapping, page, access) { return outcome }
    if case .mapped = mappings[mapping].table[page] { return nil }

    if cache[page] == .absent {
      if modes.contains(.missing) { return waits(mapping, page, access, []) }
      // Proposed as UFFD_FEATURE_MINOR_GENERIC, withdrawn: it duplicates MISSING.
      if setup.kernel.minorTrapsEveryFault, modes.contains(.minor), setup.memory.isGuestMemfd {
        return waits(mapping, page, access, .minor)
      }
      // MINOR without MISSING: an absent page is allocated and raises no event.
      cache[page] = .uptodate(0)
    } else if modes.contains(.minor) {
      // shmem_get_folio_gfp(), hugetlb_no_page(): present is enough, up to date or not.
      return waits(mapping, page, access, .minor)
    }
    makeUptodate(page)
    // do_cow_fault(): a write to a private mapping copies at once; finish_fault() keeps
    // the marker's protection.
    let isCopied = access.isWrite && mappings[mapping].setup.isPrivate
    let target: TableEntry.Target = isCopied ? .copy(read(.cache, page)) : .cache
    mappings[mapping].table[page] = .mapped(target, protection)
    return nil
  }

  private func waits(
    _ mapping: Int, _ page: Int, _ access: Access, _ flags: ModelFaultFlags
  ) -> Outcome {
    // userfault_msg(), mm/userfaultfd.c.
    let all = access.isWrite ? flags.union(.write) : flags
    return .waits(FaultEvent(mapping: mapping, page: page, flags: all))
  }

  /// What is decided before the page cache is looked at.
  private func faultBeforeLookup(_ mapping: Int, _ page: Int, _ access: Access) -> Outcome? {
    let isBeyondEnd = page >= setup.objectPages
    if isBeyondEnd, setup.kernel.eventBeyondEnd, setup.memory.isGuestMemfd,
      mappings[mapping].modes[page].contains(.missing)
    {
      // March 2026: __do_userfault() ran before ->fault, which has the size check.
      return waits(mapping, page, access, [])
    }
    // shmem_fault(): EINVAL beyond i_size; hugetlb_no_page(); and
    // kvm_gmem_fault_user_mapping(): the size, then INIT_SHARED, before any look-up.
    if isBeyondEnd || setup.memory == .guestMemfdPrivate { return .busError }
    return nil
  }

  /// A folio that is not up to date is cleared before use: shmem_get_folio_gfp() (label
  /// `clear`), kvm_gmem_fault_user_mapping(), kvm_gmem_get_pfn().
  mutating func makeUptodate(_ page: Int) {
    if cache[page] == .allocated { cache[page] = .uptodate(0) }
  }

  /// do_fault_around(), filemap_map_pages(): a read maps neighbours that are in the page
  /// cache and up to date, within 64 KiB and the area, unless WP or MINOR is armed
  /// (uffd_disable_fault_around()). Only tmpfs has ->map_pages.
  private mutating func faultAround(_ mapping: Int, _ page: Int) {
    let modes = mappings[mapping].modes[page]
    guard setup.memory.isTmpfs, modes.isDisjoint(with: [.writeProtect, .minor]) else { return }
    let area = areaPages(mapping, page)
    let place = mappings[mapping].setup.phase + page
    let first = max(area.lowerBound, page - place % 16)
    let last = min(first + 16, area.upperBound, setup.objectPages)
    for neighbour in first..<max(first, last) where mappings[mapping].table[neighbour] == .none {
      if case .uptodate = cache[neighbour] {
        mappings[mapping].table[neighbour] = .mapped(.cache, .none)
      }
    }
  }

  /// The pages of the vm_area_struct around a page: neighbours with the same
  /// registration merge (vma_modify_flags_uffd()), but on hugetlbfs, whose areas are
  /// VM_DONTEXPAND, they stay split for ever (can_vma_merge_before()).
  func areaPages(_ mapping: Int, _ page: Int) -> Range<Int> {
    let modes = mappings[mapping].modes
    let splits = mappings[mapping].splits
    var (first, end) = (page, page + 1)
    while first > 0, modes[first - 1] == modes[page], !splits[first] { first -= 1 }
    while end < modes.count, modes[end] == modes[page], !splits[end] { end += 1 }
    return first..<end
  }

  /// Splits the areas at the ends of a span where they change.
  mutating func split(_ span: Span, where changes: (ModelModes) -> Bool) {
    guard setup.memory == .hugetlb else { return }
    let modes = mappings[span.mapping].modes
    if changes(modes[span.first]) { mappings[span.mapping].splits[span.first] = true }
    let end = span.pages.upperBound
    if end < modes.count, changes(modes[end - 1]) { mappings[span.mapping].splits[end] = true }
  }
}
