// SPDX-License-Identifier: Apache-2.0

/// The kinds of memory that the model knows.
public enum ModelMemory: Hashable, Sendable, CaseIterable {
  /// MAP_PRIVATE | MAP_ANONYMOUS.
  case anonymous
  /// A memfd on tmpfs, mapped shared.
  case tmpfsShared
  /// A memfd on tmpfs, its first mapping private, the others shared.
  case tmpfsPrivate
  /// A memfd on hugetlbfs, mapped shared; pages are huge pages.
  case hugetlb
  /// guest_memfd with MMAP and INIT_SHARED.
  case guestMemfd
  /// guest_memfd with MMAP only: its memory is private to the guest at first.
  case guestMemfdPrivate

  /// The name that scripts use.
  public var name: String {
    switch self {
    case .anonymous: "anonymous"
    case .tmpfsShared: "tmpfs"
    case .tmpfsPrivate: "tmpfs-private"
    case .hugetlb: "hugetlb"
    case .guestMemfd: "guest_memfd"
    case .guestMemfdPrivate: "guest_memfd-private"
    }
  }

  /// Whether it is a guest_memfd of either sort.
  public var isGuestMemfd: Bool { self == .guestMemfd || self == .guestMemfdPrivate }

  /// Whether it is tmpfs of either sort.
  public var isTmpfs: Bool { self == .tmpfsShared || self == .tmpfsPrivate }
}

/// The errnos that the modelled calls return (errno(3)).
public enum ModelErrno: String, Hashable, Sendable, CaseIterable {
  /// Not permitted.
  case EPERM
  /// Nothing registered there, or a hole.
  case ENOENT
  /// Partial, or the mapping is changing.
  case EAGAIN
  /// No memory.
  case ENOMEM
  /// No page, or an unreadable source.
  case EFAULT
  /// Another owner.
  case EBUSY
  /// A page is there already.
  case EEXIST
  /// The object cannot do that.
  case ENODEV
  /// A wrong argument or the wrong kind of memory.
  case EINVAL
  /// The file has no position to write at.
  case ESPIPE
  /// Not supported.
  case EOPNOTSUPP
  /// An errno that no modelled call returns; only the kernel's side uses it.
  case other
}

/// Modes of UFFDIO_REGISTER.
public struct ModelModes: OptionSet, Hashable, Sendable {
  /// The kernel's bits.
  public let rawValue: UInt8
  /// Wraps the kernel's bits.
  public init(rawValue: UInt8) { self.rawValue = rawValue }
  /// UFFDIO_REGISTER_MODE_MISSING.
  public static let missing = Self(rawValue: 1)
  /// UFFDIO_REGISTER_MODE_WP.
  public static let writeProtect = Self(rawValue: 2)
  /// UFFDIO_REGISTER_MODE_MINOR.
  public static let minor = Self(rawValue: 4)
}

extension ModelModes: CustomStringConvertible {
  /// The modes' names, joined by "+"; "-" when there is none.
  public var description: String {
    let names = [(Self.missing, "MISSING"), (.minor, "MINOR"), (.writeProtect, "WP")]
      .compactMap { contains($0.0) ? $0.1 : nil }
    return names.isEmpty ? "-" : names.joined(separator: "+")
  }
}

/// Flags of a page-fault event (uffd_msg.arg.pagefault.flags).
public struct ModelFaultFlags: OptionSet, Hashable, Sendable {
  /// The kernel's bits.
  public let rawValue: UInt8
  /// Wraps the kernel's bits.
  public init(rawValue: UInt8) { self.rawValue = rawValue }
  /// UFFD_PAGEFAULT_FLAG_WRITE.
  public static let write = Self(rawValue: 1)
  /// UFFD_PAGEFAULT_FLAG_WP.
  public static let writeProtect = Self(rawValue: 2)
  /// UFFD_PAGEFAULT_FLAG_MINOR.
  public static let minor = Self(rawValue: 4)
}

/// Pages of one mapping.
public struct Span: Hashable, Sendable {
  /// Which mapping, from 0.
  public var mapping: Int
  /// The first page.
  public var first: Int
  /// How many pages; at least 1.
  public var count: Int

  /// `count` pages of a mapping.
  public init(_ mapping: Int, _ first: Int, _ count: Int = 1) {
    (self.mapping, self.first, self.count) = (mapping, first, count)
  }

  /// The pages.
  public var pages: Range<Int> { first..<(first + count) }
}

/// What a touch does with the first word of a page.
public enum Access: Hashable, Sendable {
  /// Loads it.
  case read
  /// Stores a value.
  case write(UInt64)

  /// Whether it is a store.
  public var isWrite: Bool { self != .read }
}

/// One step.
public enum Operation: Hashable, Sendable {
  /// UFFDIO_REGISTER.
  case register(Span, ModelModes)
  /// UFFDIO_UNREGISTER, without a wake of its own.
  case unregister(Span)
  /// UFFDIO_COPY; page `i` of the span gets the value `tag + i`.
  case copy(Span, tag: UInt64, writeProtected: Bool = false, wakes: Bool = true)
  /// UFFDIO_ZEROPAGE.
  case zeropage(Span, wakes: Bool = true)
  /// UFFDIO_CONTINUE.
  case `continue`(Span, wakes: Bool = true)
  /// UFFDIO_POISON.
  case poison(Span, wakes: Bool = true)
  /// UFFDIO_WRITEPROTECT; protecting never wakes.
  case writeProtect(Span, enabled: Bool, wakes: Bool = true)
  /// UFFDIO_WAKE.
  case wake(Span)
  /// A load or a store through a mapping, by a thread that can wait.
  case touch(mapping: Int, page: Int, Access)
  /// pwrite(2) of whole pages to the object; the source can be read up to page
  /// `readable`.
  case write(first: Int, count: Int, tag: UInt64, readable: Int)
  /// fallocate(2) with FALLOC_FL_KEEP_SIZE.
  case allocate(first: Int, count: Int)
  /// fallocate(2) with FALLOC_FL_PUNCH_HOLE.
  case punchHole(first: Int, count: Int)
  /// madvise(2), MADV_DONTNEED.
  case dontNeed(Span)
  /// A vCPU's access; its slot is bound to the guest_memfd.
  case vcpuTouch(page: Int, Access)
  /// Sets or clears a page's bit in the slot's userfault bitmap.
  case setUserfaultBit(page: Int, Bool)
  /// Which page table entries of a mapping are not empty.
  case inspectTable(mapping: Int)
  /// Which pages of the object are up to date, and how many exist.
  case inspectCache
}

/// A fault that userfaultfd reports.
public struct FaultEvent: Hashable, Sendable {
  /// Which mapping.
  public var mapping: Int
  /// Which page of it.
  public var page: Int
  /// Why.
  public var flags: ModelFaultFlags

  /// A fault.
  public init(mapping: Int, page: Int, flags: ModelFaultFlags) {
    (self.mapping, self.page, self.flags) = (mapping, page, flags)
  }
}

/// What a step returned.
public enum Outcome: Hashable, Sendable {
  /// Success; for a registration the mask of ioctls, for a fill the pages done, for
  /// pwrite(2) the pages written, else 0.
  case done(UInt64)
  /// An errno, and the pages that were done before it.
  case failed(ModelErrno, pagesDone: Int = 0)
  /// What a touch read, or that it stored (then what it stored).
  case value(UInt64)
  /// SIGBUS.
  case busError
  /// The access faults again and again, without an event: a defect of the kernel.
  case neverEnds
  /// The toucher waits; the event was queued.
  case waits(FaultEvent)
  /// KVM_RUN returned KVM_EXIT_MEMORY_FAULT; `userfault` is the flag of the bitmap.
  case memoryFaultExit(userfault: Bool)
  /// A bit for each page, and a count.
  case pages(UInt64, count: Int)
}

/// A step's outcome, and what became of threads that it woke.
public struct StepResult: Hashable, Sendable {
  /// What the step itself returned.
  public var outcome: Outcome
  /// What the woken touches came to, in the order in which they began to wait.
  public var resumed: [Outcome]

  /// A result.
  public init(_ outcome: Outcome, resumed: [Outcome] = []) {
    (self.outcome, self.resumed) = (outcome, resumed)
  }
}
