// SPDX-License-Identifier: Apache-2.0

public import GuestMemory
public import KVM
public import SystemPackage

/// A memory slot whose writes are tracked.
public struct TrackedSlot: Hashable, Sendable {
  /// The slot's number.
  public let number: UInt32
  /// The pages of guest memory that it has, by their numbers in the tracker's bitmap.
  public let pages: Range<Int>

  /// A slot with consecutive pages of guest memory.
  public init(number: UInt32, pages: Range<Int>) {
    self.number = number
    self.pages = pages
  }
}

/// What KVM's trackers need of the owner of a virtual machine, who alone may change its
/// slots.
public protocol DirtyLoggingMachine: AnyObject, Sendable {
  /// 4 KiB pages of guest memory.
  var trackedPageCount: Int { get }

  /// All slots of guest memory, in order. Where slots are installed step by step it waits
  /// for the last one.
  func trackedSlots() throws(DirtyTrackingError) -> [TrackedSlot]

  /// Sets or clears KVM_MEM_LOG_DIRTY_PAGES of a slot and leaves the rest of it as it is,
  /// also while vCPUs run.
  func setLogging(_ isEnabled: Bool, of slot: TrackedSlot) throws(Errno)

  /// Lends the machine.
  func withMachine<Value>(
    _ body: (borrowing VirtualMachine) throws(Errno) -> Value
  ) throws(Errno) -> Value
}

extension DirtyTrackingMethod {
  /// Why one of KVM's methods does not work on this machine; `nil` when it does.
  ///
  /// The ring works only for virtual machines that were made with one (`DirtyRings`), the
  /// log only for the others.
  public func kvmUnavailability() -> String? {
    do throws(Errno) {
      let capabilities = try KVMSystem().capabilities()
      switch self {
      case .ring:
        return capabilities.dirtyRingEntries > 0
          ? nil : "KVM here has no dirty rings (Linux 5.11, on x86)"
      case .log:
        return capabilities.manualDirtyLogProtect.contains(.enable)
          ? nil : "KVM here has no manual protection of the dirty log (Linux 5.1)"
      case .writeProtect, .async: return "\(rawValue) is a method of userfaultfd"
      }
    } catch {
      return "/dev/kvm cannot be used: \(error)"
    }
  }
}

extension DirtyTrackingError {
  /// Setting KVM_MEM_LOG_DIRTY_PAGES was refused.
  init(logging slot: TrackedSlot, _ errno: Errno) {
    guard errno == .invalidArgument else {
      self.init("Logging the writes to memory slot \(slot.number)", errno)
      return
    }
    self.init(
      .unavailable,
      "KVM refuses to log the writes to memory slot \(slot.number): slots of guest_memfd have "
        + "no log", errno: errno)
  }
}
