// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import LinuxSystem
public import SystemPackage

/// A model-specific register and its value.
public struct ModelSpecificRegister: Hashable, Sendable {
  /// The number that RDMSR takes.
  public var index: UInt32
  /// The value.
  public var value: UInt64

  /// A pair of both.
  public init(index: UInt32, value: UInt64) {
    self.index = index
    self.value = value
  }

  /// struct kvm_msr_entry.
  var bytes: [UInt8] {
    let raw = kvm_msr_entry(index: index, reserved: 0, data: value)
    return unsafe withUnsafeBytes(of: raw) { unsafe Array($0) }
  }

  /// The registers in an array of struct kvm_msr_entry.
  static func parse(_ bytes: [UInt8]) -> [Self] {
    stride(from: 0, to: bytes.count, by: MemoryLayout<kvm_msr_entry>.stride).compactMap { start in
      guard let index = ByteCursor.number(in: bytes, at: start, size: 4),
        let value = ByteCursor.number(in: bytes, at: start + 8, size: 8)
      else { return nil }
      return Self(index: UInt32(index), value: value)
    }
  }
}

extension VCPU {
  /// KVM_GET_MSRS for each of `indices`; those that the vCPU lacks are left out.
  public borrowing func modelSpecificRegisters(
    _ indices: [UInt32]
  ) throws(Errno) -> [ModelSpecificRegister] {
    var found: [ModelSpecificRegister] = []
    var rest = indices[...]
    while !rest.isEmpty {
      let asked = rest.map { ModelSpecificRegister(index: $0, value: 0) }
      let (done, answers) = try unsafe exchange(asked) { unsafe clinux_kvm_get_msrs($0, $1) }
      found += answers.prefix(done)
      // KVM stops at the first that it cannot read: go on behind it.
      rest = rest.dropFirst(done + 1)
    }
    return found
  }

  /// KVM_SET_MSRS. `invalidArgument` when KVM refuses a value; one that it lets nobody
  /// write is no error when it has that value already.
  public borrowing func setModelSpecificRegisters(
    _ registers: [ModelSpecificRegister]
  ) throws(Errno) {
    var rest = registers[...]
    while !rest.isEmpty {
      let (done, _) = try unsafe exchange(Array(rest)) { unsafe clinux_kvm_set_msrs($0, $1) }
      rest = rest.dropFirst(done)
      guard let refused = rest.popFirst() else { return }
      guard try modelSpecificRegisters([refused.index]) == [refused] else {
        throw .invalidArgument
      }
    }
  }

  /// Passes registers to one of the two calls; returns how many it dealt with and what
  /// the array holds then.
  private borrowing func exchange(
    _ registers: [ModelSpecificRegister], _ call: (CInt, UnsafeMutablePointer<kvm_msrs>) -> Int
  ) throws(Errno) -> (Int, [ModelSpecificRegister]) {
    let header = MemoryLayout<kvm_msrs>.size
    let stride = MemoryLayout<kvm_msr_entry>.stride
    let size = header + registers.count * stride
    let storage = RawStorage(byteCount: size)
    for (index, register) in registers.enumerated() {
      unsafe storage.bytes.storeBytes(
        of: kvm_msr_entry(index: register.index, reserved: 0, data: register.value),
        toByteOffset: header + index * stride, as: kvm_msr_entry.self)
    }
    let raw = unsafe storage.bytes.bindMemory(to: kvm_msrs.self, capacity: 1)
    unsafe raw.pointee.nmsrs = UInt32(registers.count)
    let done = try check(unsafe call(descriptor.rawValue, raw))
    return (done, ModelSpecificRegister.parse(Array(storage.copy(size)[header...])))
  }
}
