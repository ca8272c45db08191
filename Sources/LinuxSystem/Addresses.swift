// SPDX-License-Identifier: Apache-2.0

/// An address in the virtual memory of a process that maps guest memory. Bytes.
///
/// It is a number, not a pointer: the process may be another one.
public struct HostAddress: Hashable, Comparable, Sendable, CustomStringConvertible {
  /// The address as the kernel knows it.
  public var rawValue: UInt64

  /// Wraps a virtual address.
  @inlinable public init(_ rawValue: UInt64) { self.rawValue = rawValue }

  /// Orders by address.
  @inlinable public static func < (left: Self, right: Self) -> Bool {
    left.rawValue < right.rawValue
  }

  /// The address `bytes` further on.
  @inlinable public func advanced(by bytes: Int) -> Self {
    Self(rawValue &+ UInt64(bitPattern: Int64(bytes)))
  }

  /// The bytes from `self` to `other`.
  @inlinable public func distance(to other: Self) -> Int {
    Int(Int64(bitPattern: other.rawValue &- rawValue))
  }

  /// Hexadecimal, with 0x before it.
  public var description: String { "0x" + String(rawValue, radix: 16) }
}

/// A guest-physical address. Bytes.
public struct GuestAddress: Hashable, Comparable, Sendable, CustomStringConvertible {
  /// The guest-physical address.
  public var rawValue: UInt64

  /// Wraps a guest-physical address.
  @inlinable public init(_ rawValue: UInt64) { self.rawValue = rawValue }

  /// Orders by address.
  @inlinable public static func < (left: Self, right: Self) -> Bool {
    left.rawValue < right.rawValue
  }

  /// The address `bytes` further on.
  @inlinable public func advanced(by bytes: Int) -> Self {
    Self(rawValue &+ UInt64(bitPattern: Int64(bytes)))
  }

  /// Hexadecimal, with 0x before it.
  public var description: String { "0x" + String(rawValue, radix: 16) }
}

/// A range of virtual memory: start and length in bytes.
public struct HostRange: Hashable, Sendable, CustomStringConvertible {
  /// The first byte.
  public var start: HostAddress
  /// Bytes. Never negative.
  public var length: Int

  /// A range; `length` is in bytes.
  @inlinable public init(start: HostAddress, length: Int) {
    self.start = start
    self.length = length
  }

  /// The first byte after the range.
  @inlinable public var end: HostAddress { start.advanced(by: length) }

  /// Whether `address` lies inside.
  @inlinable public func contains(_ address: HostAddress) -> Bool {
    address >= start && address < end
  }

  /// First and end address.
  public var description: String { "\(start)..<\(end)" }
}

/// The sizes of the pages that back memory. Bytes.
public enum PageSize: Int, Sendable, CaseIterable, CustomStringConvertible {
  /// 4 KiB: base pages on x86-64.
  case size4KiB = 4096
  /// 2 MiB: hugetlbfs.
  case size2MiB = 2_097_152
  /// 1 GiB: hugetlbfs.
  case size1GiB = 1_073_741_824

  /// Bytes.
  @inlinable public var bytes: Int { rawValue }

  /// Whether `bytes` is a multiple of this size.
  @inlinable public func divides(_ bytes: Int) -> Bool { bytes & (rawValue - 1) == 0 }

  /// The size in words, such as "4 KiB".
  public var description: String {
    switch self {
    case .size4KiB: "4 KiB"
    case .size2MiB: "2 MiB"
    case .size1GiB: "1 GiB"
    }
  }
}
