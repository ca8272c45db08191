// SPDX-License-Identifier: Apache-2.0

internal import CLinux
public import LinuxSystem

/// Flags of a memory-fault exit (api.rst, KVM_EXIT_MEMORY_FAULT).
public struct MemoryFaultFlags: OptionSet, Hashable, Sendable {
  /// The bits.
  public let rawValue: UInt64
  /// Any bits, also unknown ones.
  public init(rawValue: UInt64) { self.rawValue = rawValue }
  /// KVM_MEMORY_EXIT_FLAG_PRIVATE: the access was to private memory.
  public static let privateMemory = Self(rawValue: 1 << 3)
  /// KVM_MEMORY_EXIT_FLAG_USERFAULT: the page's bit in the slot's userfault bitmap is
  /// set. No released kernel has it; Faultline's kernel series does.
  public static let userfault = Self(rawValue: 1 << 4)
}

/// Why KVM_RUN came back (api.rst, section 5, "The kvm_run structure").
public enum VCPUExit: Hashable, Sendable {
  /// IN or INS of `count` items of `size` bytes: answer with `VCPU.answer`.
  case portInput(port: UInt16, size: Int, count: Int)
  /// OUT or OUTS; `value` is the first item.
  case portOutput(port: UInt16, size: Int, count: Int, value: UInt32)
  /// A read where no slot is, or where KVM cannot read: answer with `VCPU.answer`.
  case mmioRead(address: GuestAddress, size: Int)
  /// A write where no slot is, or where KVM cannot write.
  case mmioWrite(address: GuestAddress, size: Int, value: UInt64)
  /// HLT, without an interrupt controller in the kernel.
  case halt
  /// A triple fault.
  case shutdown
  /// The memory of a slot could not be had (Linux 6.8).
  case memoryFault(address: GuestAddress, size: UInt64, flags: MemoryFaultFlags)
  /// The same without the address: KVM_RUN failed with EFAULT and no exit 39.
  case faultedMemory
  /// KVM gave up, for instance at an instruction that it cannot emulate.
  case internalError(suberror: UInt32)
  /// The processor refused the vCPU's state.
  case failedEntry(reason: UInt64)
  /// The dirty ring is full: harvest and reset it.
  case dirtyRingFull
  /// A signal or `VCPUKick`; nothing is pending afterwards (KVM_RUN gave EINTR).
  case interrupted
  /// Any other KVM_EXIT_ number.
  case other(reason: UInt32)
}

extension RunPage {
  /// Decodes the exit that KVM_RUN left in `kvm_run`.
  var exit: VCPUExit {
    // SAFETY: called by the vCPU's thread between two runs: the kernel does not write.
    let reason = unsafe run.pointee.exit_reason
    switch CInt(bitPattern: reason) {
    case KVM_EXIT_IO:
      let io = unsafe run.pointee.io
      let (size, count) = (Int(io.size), Int(io.count))
      guard io.direction == UInt8(KVM_EXIT_IO_OUT) else {
        return .portInput(port: io.port, size: size, count: count)
      }
      return .portOutput(
        port: io.port, size: size, count: count,
        value: UInt32(truncatingIfNeeded: loadValue(at: Int(io.data_offset), size: size)))
    case KVM_EXIT_MMIO:
      let mmio = unsafe run.pointee.mmio
      let address = GuestAddress(mmio.phys_addr)
      let size = min(Int(mmio.len), 8)
      guard mmio.is_write != 0 else { return .mmioRead(address: address, size: size) }
      return .mmioWrite(
        address: address, size: size, value: loadValue(at: Self.mmioDataOffset, size: size))
    case KVM_EXIT_HLT: return .halt
    case KVM_EXIT_SHUTDOWN: return .shutdown
    case KVM_EXIT_MEMORY_FAULT:
      let fault = unsafe clinux_kvm_memory_fault(run)
      return .memoryFault(
        address: GuestAddress(fault.gpa), size: fault.size,
        flags: MemoryFaultFlags(rawValue: fault.flags))
    case KVM_EXIT_INTERNAL_ERROR:
      return .internalError(suberror: unsafe run.pointee.`internal`.suberror)
    case KVM_EXIT_FAIL_ENTRY:
      return .failedEntry(reason: unsafe run.pointee.fail_entry.hardware_entry_failure_reason)
    case KVM_EXIT_DIRTY_RING_FULL: return .dirtyRingFull
    case KVM_EXIT_INTR: return .interrupted
    default: return .other(reason: reason)
    }
  }
}
