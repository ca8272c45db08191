// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import LinuxSystem
internal import SystemPackage

/// A vCPU's `kvm_run` and the data pages behind it, mapped as long as the vCPU or
/// somebody who may kick it lives.
@safe
final class RunPage: Sendable {
  // SAFETY: `immediate_exit` is written atomically by any thread. All the rest belongs to
  // the thread that runs the vCPU, and the kernel writes it during KVM_RUN only.
  private let mapping: Mapping

  /// Where MMIO data lies: after the 8-byte address at the head of the exit union.
  static let mmioDataOffset = 40

  init(_ vcpu: borrowing OwnedDescriptor, size: Int) throws(Errno) {
    guard size >= MemoryLayout<kvm_run>.size else { throw .invalidArgument }
    mapping = try Mapping(of: vcpu, length: size, sharing: .shared)
  }

  @unsafe var run: UnsafeMutablePointer<kvm_run> {
    // SAFETY: the mapping has at least the size of the structure, see init.
    unsafe mapping.pointer.assumingMemoryBound(to: kvm_run.self)
  }

  /// Bytes of the mapping; nothing where the kernel's offset and count do not fit.
  @unsafe func bytes(at offset: Int, count: Int) -> UnsafeMutableRawBufferPointer {
    guard offset >= 0, count >= 0, offset <= mapping.length - count else {
      return unsafe UnsafeMutableRawBufferPointer(start: nil, count: 0)
    }
    return unsafe UnsafeMutableRawBufferPointer(start: mapping.pointer + offset, count: count)
  }

  /// A little-endian number of up to 8 bytes.
  func loadValue(at offset: Int, size: Int) -> UInt64 {
    var value: UInt64 = 0
    unsafe withUnsafeMutableBytes(of: &value) { target in
      unsafe target.copyBytes(from: bytes(at: offset, count: min(size, 8)))
    }
    return value
  }

  /// Writes the low `size` bytes of a number.
  func store(_ value: UInt64, at offset: Int, size: Int) {
    unsafe withUnsafeBytes(of: value.littleEndian) { source in
      let target = unsafe bytes(at: offset, count: min(size, 8))
      unsafe target.copyBytes(from: source.prefix(target.count))
    }
  }

  /// From any thread: whether KVM_RUN is to return EINTR at once.
  func setImmediateExit(_ wanted: Bool) {
    unsafe clinux_kvm_set_immediate_exit(run, wanted ? 1 : 0)
  }
}
