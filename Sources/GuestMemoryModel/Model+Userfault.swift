// SPDX-License-Identifier: Apache-2.0

// The ioctls of ioctl_userfaultfd(2), mm/userfaultfd.c.
extension Model {
  // MARK: - Registration

  /// userfaultfd_register().
  mutating func register(_ span: Span, _ modes: ModelModes) -> Outcome {
    // No mode, or MINOR on anonymous memory (anon_can_userfault()).
    guard !modes.isEmpty, canRegister(modes) else { return .failed(.EINVAL) }
    let held = mappings[span.mapping].modes
    if setup.kernel.release == .linux7_3 {
      // 7.3: a registration may not drop WP; first, before anything changes.
      let drops = span.pages.contains {
        held[$0].contains(.writeProtect) && !modes.contains(.writeProtect)
      }
      if drops { return .failed(.EBUSY) }
    }
    split(span) { !$0.isSuperset(of: modes) }
    for page in span.pages where !held[page].isSuperset(of: modes) {
      // userfaultfd_register_range() skips an area that has all the modes already: more
      // modes than asked for stay.
      mappings[span.mapping].modes[page] = modes
    }
    return .done(ioctls(modes))
  }

  private func canRegister(_ modes: ModelModes) -> Bool {
    switch setup.memory {
    case .anonymous: !modes.contains(.minor)
    case .tmpfsShared, .tmpfsPrivate, .hugetlb: true
    // vma_can_userfault(): no vm_uffd_ops, only asynchronous WP, which is not modelled.
    case .guestMemfd: setup.kernel.guestMemfdModes.isSuperset(of: modes)
    case .guestMemfdPrivate: false
    }
  }

  /// UFFD_API_RANGE_IOCTLS, or the basic ones for hugetlbfs.
  private func ioctls(_ modes: ModelModes) -> UInt64 {
    // WAKE, COPY, ZEROPAGE, MOVE, POISON.
    var mask: UInt64 = 1 << 2 | 1 << 3 | 1 << 4 | 1 << 5 | 1 << 8
    // UFFD_API_RANGE_IOCTLS_BASIC has no ZEROPAGE and no MOVE.
    if setup.memory == .hugetlb { mask &= ~(1 << 4 | 1 << 5) }
    if setup.memory.isGuestMemfd, !setup.kernel.guestMemfdCopy { mask &= ~(1 << 3 | 1 << 4) }
    if modes.contains(.writeProtect) { mask |= 1 << 6 }
    if modes.contains(.minor) { mask |= 1 << 7 }
    return mask
  }

  /// userfaultfd_unregister(): wakes the waiters of MISSING ranges, and of no others.
  mutating func unregister(_ span: Span) -> StepResult {
    if setup.memory.isGuestMemfd, !canRegister(.missing) {
      return StepResult(.failed(.EINVAL))
    }
    let held = mappings[span.mapping].modes
    split(span) { !$0.isEmpty }
    for page in span.pages {
      // userfaultfd_clear_vma() resolves the protection of a WP area.
      if held[page].contains(.writeProtect) { resolveProtection(span.mapping, page) }
      mappings[span.mapping].modes[page] = []
    }
    let resumed = span.pages.filter { held[$0].contains(.missing) }
      .flatMap { wake(Span(span.mapping, $0)) }
    return StepResult(.done(0), resumed: resumed)
  }

  // MARK: - Protection

  /// mwriteprotect_range(): area by area; those before the one that fails stay changed.
  mutating func writeProtect(_ span: Span, enabled: Bool) -> Outcome {
    for page in span.pages {
      guard mappings[span.mapping].modes[page].contains(.writeProtect) else {
        return .failed(.ENOENT)
      }
      if enabled { protect(span.mapping, page) } else { resolveProtection(span.mapping, page) }
    }
    return .done(0)
  }

  /// change_pte_range(), mm/mprotect.c and hugetlb_change_protection(), mm/hugetlb.c.
  private mutating func protect(_ mapping: Int, _ page: Int) {
    switch mappings[mapping].table[page] {
    case .none:
      // userfaultfd_wp_use_markers(): anonymous memory only with WP_UNPOPULATED.
      if setup.memory != .anonymous || setup.protectsUnpopulated {
        mappings[mapping].table[page] = .protectedMarker
      }
    case .mapped(let target, _): mappings[mapping].table[page] = .mapped(target, .armed)
    case .protectedMarker, .poison: break
    }
  }

  private mutating func resolveProtection(_ mapping: Int, _ page: Int) {
    switch mappings[mapping].table[page] {
    case .protectedMarker: mappings[mapping].table[page] = .none
    case .mapped(let target, _): mappings[mapping].table[page] = .mapped(target, .none)
    case .none, .poison: break
    }
  }

  // MARK: - Filling

  /// mfill_atomic(): the common part of COPY, ZEROPAGE, CONTINUE and POISON.
  mutating func fill(_ operation: Operation) -> StepResult {
    guard let (span, wakes) = operation.filled else { preconditionFailure("not a fill") }
    let modes = mappings[span.mapping].modes[span.first]
    // mfill_get_vma(): the range must lie in one registered area.
    guard !modes.isEmpty, areaPages(span.mapping, span.first).upperBound >= span.pages.upperBound
    else { return StepResult(.failed(.ENOENT)) }
    switch operation {
    case .copy(_, _, true, _) where !modes.contains(.writeProtect):
      return StepResult(.failed(.EINVAL))
    case .continue where setup.memory == .anonymous:
      // No get_folio_noalloc.
      return StepResult(.failed(.EINVAL))
    case .zeropage where setup.memory == .hugetlb:
      // There is no huge zero page to map: mfill_atomic_hugetlb().
      return StepResult(.failed(.EINVAL))
    case .copy, .zeropage:
      if setup.memory.isGuestMemfd, !setup.kernel.guestMemfdCopy {
        return StepResult(.failed(.EINVAL))
      }
    default: break
    }
    var done = 0
    for page in span.pages {
      guard let errno = fillPage(operation, span, page) else {
        done += 1
        continue
      }
      guard done > 0 else { return StepResult(.failed(errno)) }
      // Partial progress: EAGAIN, and the part that is done is woken.
      let part = Span(span.mapping, span.first, done)
      return StepResult(
        .failed(.EAGAIN, pagesDone: done), resumed: wakes ? wake(part) : [])
    }
    return StepResult(.done(UInt64(done)), resumed: wakes ? wake(span) : [])
  }

  private mutating func fillPage(_ operation: Operation, _ span: Span, _ page: Int) -> ModelErrno? {
    switch operation {
    case .copy(_, let tag, let writeProtected, _):
      let value = tag + UInt64(page - span.first)
      return copyPage(span.mapping, page, value, writeProtected ? .armed : .none)
    case .zeropage: return zeroPage(span.mapping, page)
    case .continue: return continuePage(span.mapping, page)
    default: return poisonPage(span.mapping, page)
    }
  }

  private func isBeyondEnd(_ page: Int) -> Bool { page >= setup.objectPages }

  /// mfill_atomic_pte_copy(): to the page cache of a shared mapping, else anonymous
  /// memory that leaves the object alone.
  private mutating func copyPage(
    _ mapping: Int, _ page: Int, _ value: UInt64, _ protection: TableEntry.Protection
  ) -> ModelErrno? {
    let isPrivate = mappings[mapping].setup.isPrivate
    let entry = mappings[mapping].table[page]
    if setup.memory == .hugetlb {
      // mfill_atomic_hugetlb() looks at the entry first, then at the cache, last at the
      // size.
      if case .mapped = entry { return .EEXIST }
      if !isBeyondEnd(page), cache[page] != .absent { return .EEXIST }
      if isBeyondEnd(page) { return .EFAULT }
    } else if isPrivate {
      // mfill_atomic_install_pte(): the size, then the entry. Markers are overwritten.
      if isBeyondEnd(page) { return .EFAULT }
      if case .mapped = entry { return .EEXIST }
      mappings[mapping].table[page] = .mapped(.copy(value), protection)
      return nil
    } else {
      // 6.18 shmem_mfill_atomic_pte(): EFAULT; 7.3 shmem_mfill_folio_alloc(): no folio.
      if isBeyondEnd(page) { return setup.kernel.release == .linux6_18 ? .EFAULT : .ENOMEM }
      // shmem_add_to_page_cache().
      if cache[page] != .absent { return .EEXIST }
      if case .mapped = entry { return .EEXIST }
    }
    cache[page] = .uptodate(value)
    mappings[mapping].table[page] = .mapped(.cache, protection)
    return nil
  }

  /// mfill_atomic_pte_zeropage(): a private mapping gets the zero page, and only where
  /// the entry is empty, markers included; a shared one gets a cleared folio.
  private mutating func zeroPage(_ mapping: Int, _ page: Int) -> ModelErrno? {
    guard mappings[mapping].setup.isPrivate else { return copyPage(mapping, page, 0, .none) }
    if isBeyondEnd(page) { return .EFAULT }
    if mappings[mapping].table[page] != .none { return .EEXIST }
    mappings[mapping].table[page] = .mapped(.zero, .none)
    return nil
  }

  /// mfill_atomic_pte_continue(), hugetlb_mfill_atomic_pte(): the folio first, then the
  /// entry.
  private mutating func continuePage(_ mapping: Int, _ page: Int) -> ModelErrno? {
    if isBeyondEnd(page) {
      // 6.18 hands shmem_get_folio()'s EINVAL on; 7.3 makes all failures EFAULT.
      let isInvalid = setup.kernel.release == .linux6_18 && setup.memory.isTmpfs
      return isInvalid ? .EINVAL : .EFAULT
    }
    if cache[page] == .absent { return .EFAULT }
    // shmem_get_folio(SGP_NOALLOC) clears a fallocated folio. The version of March 2026
    // did not for guest_memfd: whoever reads the page sees what the memory held before.
    if !(setup.memory.isGuestMemfd && setup.kernel.continueExposesStale) { makeUptodate(page) }
    if case .mapped = mappings[mapping].table[page] { return .EEXIST }
    mappings[mapping].table[page] = .mapped(.cache, .none)
    return nil
  }

  /// mfill_atomic_pte_poison(): the size, then any entry, even a marker. hugetlbfs does
  /// not look at the size.
  private mutating func poisonPage(_ mapping: Int, _ page: Int) -> ModelErrno? {
    if isBeyondEnd(page), setup.memory != .hugetlb { return .EFAULT }
    if mappings[mapping].table[page] != .none { return .EEXIST }
    mappings[mapping].table[page] = .poison
    return nil
  }
}

extension Operation {
  /// The span and the wake flag of an operation that fills pages.
  var filled: (Span, wakes: Bool)? {
    switch self {
    case .copy(let span, _, _, let wakes), .zeropage(let span, let wakes),
      .continue(let span, let wakes), .poison(let span, let wakes):
      (span, wakes)
    default: nil
    }
  }
}
