// SPDX-License-Identifier: Apache-2.0

internal import CLinux
public import LinuxSystem
public import SystemPackage

/// What a userfaultfd reports, decoded once (struct uffd_msg).
public enum UserfaultEvent: ~Copyable, Sendable {
  /// A thread waits for a page.
  case pageFault(PageFault)
  /// The process forked; the child's ranges report on the new userfaultfd. Dropping
  /// it releases the child's faults as zeros.
  case fork(child: OwnedDescriptor)
  /// mremap(2) moved `length` bytes.
  case remap(from: HostAddress, to: HostAddress, length: Int)
  /// madvise(2) is about to drop the pages of a range. The caller of madvise waits
  /// until this event has been read, not until it has been handled.
  case remove(HostRange)
  /// munmap(2) removed a range.
  case unmap(HostRange)
  /// An event that this version does not know.
  case unknown(UInt8)
}

/// A page fault that waits to be resolved.
public struct PageFault: Hashable, Sendable {
  /// What kind of access, and why it trapped.
  public struct Flags: OptionSet, Hashable, Sendable {
    /// The kernel's bits; unknown ones are kept.
    public let rawValue: UInt64
    /// Wraps the kernel's bits.
    @inlinable public init(rawValue: UInt64) { self.rawValue = rawValue }
    /// The access was a write.
    public static var write: Self { Self(rawValue: 1) }
    /// The page is write-protected.
    public static var writeProtect: Self { Self(rawValue: 2) }
    /// The page is in the page cache (MINOR).
    public static var minor: Self { Self(rawValue: 4) }
    /// The page is read-write-protected (RWP).
    public static var readWriteProtect: Self { Self(rawValue: 8) }
    /// Either of the two: the page is there.
    @inlinable public var isProtection: Bool { rawValue & 10 != 0 }
  }

  /// Where; masked to the page unless `exactAddress` was negotiated.
  public var address: HostAddress
  /// The access.
  public var flags: Flags
  /// The kernel's id of the waiting thread, 0 unless `threadID` was negotiated. For a
  /// vCPU with asynchronous page faults it can be a kernel worker's.
  public var threadID: UInt32

  /// A fault as the kernel reports it.
  public init(address: HostAddress, flags: Flags, threadID: UInt32 = 0) {
    self.address = address
    self.flags = flags
    self.threadID = threadID
  }
}

/// Room for events, allocated once, and a cursor through those that were read.
///
/// Events that are dropped unread are lost: a fault must be woken to be raised
/// again, and a fork's descriptor stays open.
@safe
public struct EventBuffer: ~Copyable {
  private let messages: UnsafeMutableBufferPointer<uffd_msg>
  private var next = 0
  private var count = 0
  /// Whether the kernel reads without waiting where that is asked for (Linux 6.10).
  private var canReadWithoutWaiting = true

  /// Room for `capacity` events (32 bytes each).
  public init(capacity: Int = 32) {
    unsafe messages = .allocate(capacity: capacity)
  }

  deinit { unsafe messages.deallocate() }

  /// The events that were read and not yet popped.
  public var isEmpty: Bool { next == count }

  /// Reads what is pending, as many as there is room for; 0 when nothing is.
  ///
  /// It does not wait, also where another process that has the descriptor made it wait (O_NONBLOCK
  /// is of the open file, which they share); before Linux 6.10 it does then.
  ///
  /// The kernel hands out page faults before all other events, so a fault can be
  /// read before a remove that precedes it in time. The buffer must be empty.
  public mutating func read(from userfaultfd: borrowing Userfaultfd) throws(Errno) -> Int {
    precondition(isEmpty, "unhandled userfaultfd events would be lost")
    let length = unsafe messages.count * MemoryLayout<uffd_msg>.stride
    let bytes = unsafe messages.baseAddress
    var result = -Int(EOPNOTSUPP)
    if canReadWithoutWaiting {
      result = unsafe clinux_read_nowait(userfaultfd.descriptor.rawValue, bytes, length)
    }
    if result == -Int(EOPNOTSUPP) {
      canReadWithoutWaiting = false
      result = unsafe clinux_read(userfaultfd.descriptor.rawValue, bytes, length)
    }
    (next, count) = (0, 0)
    if result == -Int(EAGAIN) || result == -Int(EINTR) { return 0 }
    count = try check(result) / MemoryLayout<uffd_msg>.stride
    return count
  }

  /// Takes the next event.
  public mutating func pop() -> UserfaultEvent? {
    guard next < count else { return nil }
    // SAFETY: the kernel wrote `count` whole messages; `next` is below that. The
    // union's member is the one that `event` names.
    let message = unsafe messages[next]
    next += 1
    let arg = message.arg
    switch CInt(message.event) {
    case UFFD_EVENT_PAGEFAULT:
      let fault = unsafe arg.pagefault
      return .pageFault(
        PageFault(
          address: HostAddress(fault.address), flags: PageFault.Flags(rawValue: fault.flags),
          threadID: unsafe fault.feat.ptid))
    case UFFD_EVENT_FORK:
      return .fork(child: OwnedDescriptor(owning: CInt(bitPattern: unsafe arg.fork.ufd)))
    case UFFD_EVENT_REMAP:
      let remap = unsafe arg.remap
      return .remap(
        from: HostAddress(remap.from), to: HostAddress(remap.to), length: Int(remap.len))
    case UFFD_EVENT_REMOVE, UFFD_EVENT_UNMAP:
      let removed = unsafe arg.remove
      let start = HostAddress(removed.start)
      let range = HostRange(start: start, length: start.distance(to: HostAddress(removed.end)))
      return CInt(message.event) == UFFD_EVENT_REMOVE ? .remove(range) : .unmap(range)
    default:
      return .unknown(message.event)
    }
  }
}
