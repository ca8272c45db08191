// SPDX-License-Identifier: Apache-2.0

public import KVM
public import LinuxSystem
internal import SystemPackage

/// A virtual machine that exists before its guest, because a guest_memfd belongs to one, or
/// because vCPUs are to have dirty rings.
public final class GuestMachineHandle: Sendable {
  /// The machine, without memory and vCPUs until a guest is made with it.
  public let machine: VirtualMachine
  /// Entries of each vCPU's dirty ring; 0 when it has none.
  let dirtyRingEntries: Int

  /// A machine for one guest.
  ///
  /// - Parameter dirtyRingEntries: gives each vCPU a dirty ring, which replaces the dirty
  ///   log: a power of two from 1024 to `KVMCapabilities.dirtyRingEntries`; 0 for none.
  public init(dirtyRingEntries: Int = 0) throws(GuestError) {
    self.dirtyRingEntries = dirtyRingEntries
    let system = try host("Opening /dev/kvm") { () throws(Errno) in try KVMSystem() }
    machine = try host("Creating a virtual machine") { () throws(Errno) in
      try VirtualMachine(system)
    }
    guard dirtyRingEntries > 0 else { return }
    try host("Enabling dirty rings of \(dirtyRingEntries) entries") { () throws(Errno) in
      try machine.enableDirtyRings(entries: dirtyRingEntries)
    }
  }
}

/// How the memory slots of a guest take their pages from a guest_memfd.
public struct GuestMemfdBinding: Sendable {
  /// A guest_memfd behind a shared reference.
  public final class File: Sendable {
    /// The guest_memfd.
    public let descriptor: OwnedDescriptor
    /// A descriptor of its own.
    public init(_ descriptor: consuming OwnedDescriptor) { self.descriptor = descriptor }
  }

  let file: File
  let userfaults: UserfaultBitmap?
  let provide: @Sendable (_ vcpu: Int, _ address: GuestAddress) -> Bool

  /// A binding of the whole guest.
  ///
  /// - Parameters:
  ///   - file: as long as the guest's memory.
  ///   - userfaults: which pages vCPUs have to ask for; `nil` for a guest_memfd that is
  ///     complete.
  ///   - provide: called on a vCPU's thread that needs a page whose bit is set. It provides
  ///     the page, clears the bit and returns `true`, or `false` when there is no right
  ///     content: the vCPU then stops with a memory fault.
  public init(
    file: File, userfaults: UserfaultBitmap? = nil,
    provide: @escaping @Sendable (_ vcpu: Int, _ address: GuestAddress) -> Bool = { _, _ in false }
  ) {
    self.file = file
    self.userfaults = userfaults
    self.provide = provide
  }
}
