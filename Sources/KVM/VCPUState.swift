// SPDX-License-Identifier: Apache-2.0

internal import CLinux

/// A part of a vCPU's state: one kernel structure.
public enum VCPUComponent: UInt32, CaseIterable, Hashable, Sendable {
  /// struct kvm_regs.
  case registers = 1
  /// struct kvm_sregs.
  case systemRegisters = 2
  /// struct kvm_xsave, with its extension (KVM_CAP_XSAVE2).
  case extendedState = 3
  /// struct kvm_xcrs.
  case extendedControl = 4
  /// struct kvm_debugregs.
  case debugRegisters = 5
  /// struct kvm_vcpu_events.
  case events = 6
  /// struct kvm_mp_state.
  case runState = 7
  /// An array of struct kvm_msr_entry.
  case modelSpecific = 8
  /// struct kvm_lapic_state; only with an interrupt controller in the kernel.
  case localAPIC = 9
  /// An array of struct kvm_cpuid_entry2.
  case cpuid = 10
  /// The rate of the time-stamp counter in kHz, 32 bits.
  case tscRate = 11
  /// struct kvm_fpu: what hosts without XSAVE have instead of the extended state.
  case floatingPoint = 12

  /// Bytes, for structures of one size only.
  var fixedSize: Int? {
    switch self {
    case .registers: MemoryLayout<kvm_regs>.size
    case .systemRegisters: MemoryLayout<kvm_sregs>.size
    case .extendedState, .modelSpecific, .cpuid: nil
    case .extendedControl: MemoryLayout<kvm_xcrs>.size
    case .debugRegisters: MemoryLayout<kvm_debugregs>.size
    case .events: MemoryLayout<kvm_vcpu_events>.size
    case .runState: MemoryLayout<kvm_mp_state>.size
    case .localAPIC: MemoryLayout<kvm_lapic_state>.size
    case .tscRate: 4
    case .floatingPoint: MemoryLayout<kvm_fpu>.size
    }
  }

  /// Whether a component may have that many bytes.
  func accepts(_ size: Int) -> Bool {
    switch self {
    case .extendedState: (4096...65_536).contains(size)
    case .modelSpecific: size % MemoryLayout<kvm_msr_entry>.size == 0 && size <= 65_536
    case .cpuid: size % MemoryLayout<kvm_cpuid_entry2>.size == 0 && size <= 65_536
    default: size == fixedSize
    }
  }

  /// Without these a long-mode guest cannot go on.
  static let required: [Self] = [.cpuid, .registers, .systemRegisters, .events, .runState]
}

/// Why bytes are not a vCPU's state.
public struct VCPUStateError: Error, Hashable, Sendable, CustomStringConvertible {
  /// What is wrong with them, and where.
  public let description: String

  init(_ reason: String) {
    description =
      "The vCPU state cannot be used: \(reason). "
      + "It is damaged or was written by another version."
  }
}

/// Everything that a vCPU in long mode needs to go on elsewhere. The layout of its bytes
/// is in docs/vcpu-state.md.
public struct VCPUState: Hashable, Sendable {
  private static let magic = Array("FLTVCPU\0".utf8)
  private static let version: UInt16 = 1
  private static let architecture: UInt16 = 62  // EM_X86_64
  private static let headerSize = 16

  private var components: [VCPUComponent: [UInt8]]

  init(components: [VCPUComponent: [UInt8]]) { self.components = components }

  /// The kernel structure of a part, `nil` when the state lacks it.
  public func bytes(of component: VCPUComponent) -> [UInt8]? { components[component] }

  /// Where the guest goes on.
  public var instructionPointer: UInt64 {
    guard let bytes = components[.registers] else { return 0 }
    let offset = MemoryLayout<kvm_regs>.offset(of: \.rip) ?? 0
    return ByteCursor.number(in: bytes, at: offset, size: 8) ?? 0
  }

  // MARK: - Bytes

  /// The state as bytes; the same state gives the same bytes.
  public func encode() -> [UInt8] {
    let records = components.sorted { $0.key.rawValue < $1.key.rawValue }
    var bytes = Self.magic
    func append(_ value: some FixedWidthInteger) {
      for shift in stride(from: 0, to: value.bitWidth, by: 8) {
        bytes.append(UInt8(truncatingIfNeeded: value >> shift))
      }
    }
    append(Self.version)
    append(Self.architecture)
    append(UInt32(records.count))
    for (component, payload) in records {
      append(component.rawValue)
      append(UInt32(payload.count))
      bytes.append(contentsOf: payload)
    }
    return bytes
  }

  /// Reads what `encode()` made. Bytes from anywhere are safe: what is not a state in all
  /// its lengths is refused. Whether the registers' values make sense is KVM's to judge
  /// when they are restored.
  public init(decoding bytes: [UInt8]) throws(VCPUStateError) {
    var cursor = ByteCursor(bytes)
    guard cursor.take(Self.magic.count) == Self.magic else {
      throw VCPUStateError("it does not begin with FLTVCPU")
    }
    guard let version = cursor.takeNumber(size: 2), version == Self.version else {
      throw VCPUStateError("its version is not \(Self.version)")
    }
    guard let architecture = cursor.takeNumber(size: 2), architecture == Self.architecture else {
      throw VCPUStateError("it is not for x86-64")
    }
    guard let count = cursor.takeNumber(size: 4) else {
      throw VCPUStateError("it ends within its header")
    }
    var components: [VCPUComponent: [UInt8]] = [:]
    for record in 0..<count {
      guard let tag = cursor.takeNumber(size: 4), let size = cursor.takeNumber(size: 4),
        let payload = cursor.take(Int(size))
      else {
        throw VCPUStateError("it ends within record \(record) of \(count)")
      }
      guard let component = VCPUComponent(rawValue: UInt32(tag)) else {
        throw VCPUStateError("record \(record) has the unknown tag \(tag)")
      }
      guard component.accepts(payload.count) else {
        throw VCPUStateError("record \(component) cannot have \(payload.count) bytes")
      }
      guard components.updateValue(payload, forKey: component) == nil else {
        throw VCPUStateError("record \(component) is there twice")
      }
    }
    guard cursor.isAtEnd else { throw VCPUStateError("bytes follow after its last record") }
    for component in VCPUComponent.required where components[component] == nil {
      throw VCPUStateError("record \(component) is missing")
    }
    guard components[.extendedState] != nil || components[.floatingPoint] != nil else {
      throw VCPUStateError("it has no floating-point state")
    }
    self.init(components: components)
  }
}

/// Takes bytes and little-endian numbers from the front, `nil` beyond the end.
package struct ByteCursor {
  private let bytes: [UInt8]
  private var position = 0

  package init(_ bytes: [UInt8]) { self.bytes = bytes }

  package var isAtEnd: Bool { position == bytes.count }

  package mutating func take(_ count: Int) -> [UInt8]? {
    guard count >= 0, count <= bytes.count - position else { return nil }
    defer { position += count }
    return Array(bytes[position..<position + count])
  }

  /// `size` is at most 8 bytes.
  package mutating func takeNumber(size: Int) -> UInt64? {
    guard let value = Self.number(in: bytes, at: position, size: size) else { return nil }
    position += size
    return value
  }

  package static func number(in bytes: [UInt8], at offset: Int, size: Int) -> UInt64? {
    guard offset >= 0, offset <= bytes.count - size else { return nil }
    return bytes[offset..<offset + size].reversed().reduce(0) { $0 << 8 | UInt64($1) }
  }
}
