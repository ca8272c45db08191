// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import LinuxSystem
public import SystemPackage

/// A virtual processor (api.rst, KVM_CREATE_VCPU).
///
/// One thread at a time may call its methods; `kick` is for the others. All ioctls but
/// KVM_RUN want the vCPU out of the guest, and wait for that.
@safe
public struct VCPU: ~Copyable, @unchecked Sendable {
  // SAFETY: the kernel serialises a vCPU's ioctls by itself; `page` says what its users
  // may touch.

  /// The number that it was made with.
  public let identifier: Int
  /// Gets it out of `run()` from another thread.
  public let kick: VCPUKick
  let descriptor: OwnedDescriptor
  let page: RunPage
  let extendedStateSize: Int

  /// Adds a vCPU to a machine.
  ///
  /// - Parameter identifier: below `KVMCapabilities.maximumVCPUs`, unique; `fileExists`
  ///   when taken.
  public init(_ machine: borrowing VirtualMachine, identifier: Int) throws(Errno) {
    guard identifier >= 0 else { throw .invalidArgument }
    let made = clinux_kvm_create_vcpu(machine.descriptor.rawValue, UInt(identifier))
    let descriptor = OwnedDescriptor(owning: CInt(try check(made)))
    let page = try RunPage(descriptor, size: machine.runSize)
    self.identifier = identifier
    self.page = page
    kick = VCPUKick(page)
    extendedStateSize = machine.extendedStateSize
    self.descriptor = descriptor
  }

  // MARK: - Running

  /// Runs the guest until it needs something (KVM_RUN).
  ///
  /// A signal or a kick is the answer `.interrupted`, not an error. An access that the
  /// last exit asked for counts as done only after the next call; call
  /// `completePendingExit()` before reading registers.
  public borrowing func run() throws(Errno) -> VCPUExit {
    // SAFETY: the vCPU is not running. Older kernels leave the last reason in place when
    // KVM_RUN fails, so it is cleared to tell a memory fault from a bare EFAULT.
    unsafe page.run.pointee.exit_reason = UInt32(KVM_EXIT_UNKNOWN)
    let result = clinux_kvm_run(descriptor.rawValue, 0)
    switch result {
    case -Int(EINTR), -Int(EAGAIN): return .interrupted
    case -Int(EFAULT), -Int(EHWPOISON):
      if case .memoryFault(let address, let size, let flags) = page.exit {
        return .memoryFault(address: address, size: size, flags: flags)
      }
      return .faultedMemory
    default:
      _ = try check(result)
      return page.exit
    }
  }

  /// Answers `.portInput` (every item gets the value) or `.mmioRead`. The guest sees it
  /// at the next `run()`.
  public borrowing func answer(_ value: UInt64) {
    switch page.exit {
    case .portInput(_, let size, let count):
      // SAFETY: between two runs `kvm_run` belongs to this thread.
      let offset = unsafe Int(page.run.pointee.io.data_offset)
      for item in 0..<count { page.store(value, at: offset + item * size, size: size) }
    case .mmioRead(_, let size):
      page.store(value, at: RunPage.mmioDataOffset, size: size)
    default: break
    }
  }

  /// Answers a `.portInput` of several items, byte by byte; what is missing reads as zero.
  public borrowing func answer(bytes: [UInt8]) {
    guard case .portInput(_, let size, let count) = page.exit else { return }
    // SAFETY: between two runs `kvm_run` belongs to this thread; the buffer is cut to the
    // mapping.
    let target = unsafe page.bytes(at: Int(page.run.pointee.io.data_offset), count: size * count)
    for index in 0..<target.count {
      unsafe target[index] = index < bytes.count ? bytes[index] : 0
    }
  }

  /// Finishes the instruction of the last exit without running the guest any further
  /// (api.rst, the note on KVM_EXIT_IO): afterwards the registers are consistent.
  ///
  /// An instruction with several accesses can exit again, which is returned: answer it
  /// and call again. `.interrupted` means done.
  public borrowing func completePendingExit() throws(Errno) -> VCPUExit {
    page.setImmediateExit(true)
    defer { page.setImmediateExit(false) }
    return try run()
  }
}
