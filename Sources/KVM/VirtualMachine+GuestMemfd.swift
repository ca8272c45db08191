// SPDX-License-Identifier: Apache-2.0

internal import CLinux
public import LinuxSystem
public import SystemPackage

/// Flags of a guest_memfd (api.rst, KVM_CREATE_GUEST_MEMFD). Unknown bits are kept and
/// left to the kernel to refuse.
public struct GuestMemfdFlags: OptionSet, Hashable, Sendable, CustomStringConvertible {
  /// The bits.
  public let rawValue: UInt64
  /// Any bits, also unknown ones.
  public init(rawValue: UInt64) { self.rawValue = rawValue }
  /// GUEST_MEMFD_FLAG_MMAP: user space may map it (Linux 6.18).
  public static let mmap = Self(rawValue: 1 << 0)
  /// GUEST_MEMFD_FLAG_INIT_SHARED: its memory is shared from the start, so a mapping can
  /// be touched; without it a touch raises SIGBUS (Linux 6.18).
  public static let initShared = Self(rawValue: 1 << 1)
  /// GUEST_MEMFD_FLAG_WRITE: pwrite(2) adds whole absent pages; needs `initShared`. No
  /// released kernel has it; Faultline's kernel series does (kernel/README.md).
  public static let write = Self(rawValue: 1 << 2)

  /// The names, and a number for unknown bits.
  public var description: String {
    var names: [String] = []
    if contains(.mmap) { names.append("mmap") }
    if contains(.initShared) { names.append("init-shared") }
    if contains(.write) { names.append("write") }
    let unknown = subtracting([.mmap, .initShared, .write]).rawValue
    if unknown != 0 { names.append("0x" + String(unknown, radix: 16)) }
    return names.isEmpty ? "none" : names.joined(separator: "+")
  }
}

extension VirtualMachine {
  /// Memory that belongs to this machine and has no mapping of its own
  /// (KVM_CREATE_GUEST_MEMFD, Linux 6.8).
  ///
  /// Throws `invalidArgument` for flags that the host or the machine's type lacks.
  /// - Parameter length: bytes; a multiple of 4 KiB.
  public borrowing func makeGuestMemfd(
    length: Int, flags: GuestMemfdFlags = []
  ) throws(Errno) -> OwnedDescriptor {
    var request = kvm_create_guest_memfd()
    request.size = UInt64(length)
    request.flags = flags.rawValue
    let made = unsafe clinux_kvm_create_guest_memfd(descriptor.rawValue, &request)
    return OwnedDescriptor(owning: CInt(try check(made)))
  }
}
