// SPDX-License-Identifier: Apache-2.0

/// Which faults of a range a userfaultfd gets (UFFDIO_REGISTER).
public struct RegistrationModes: OptionSet, Hashable, Sendable, CustomStringConvertible {
  /// The kernel's bits.
  public let rawValue: UInt64

  /// Wraps the kernel's bits.
  public init(rawValue: UInt64) { self.rawValue = rawValue }

  /// The page is not there, nor in the page cache.
  public static let missing = Self(rawValue: 1 << 0)
  /// A write to a write-protected page.
  public static let writeProtect = Self(rawValue: 1 << 1)
  /// The page is in the page cache, but not in this page table.
  ///
  /// Alone it says nothing of absent pages: the kernel fills those with zeros and
  /// raises no event. Populating on demand needs `[.missing, .minor]`.
  public static let minor = Self(rawValue: 1 << 2)
  /// Any access to a read-write-protected page (Linux 7.3).
  public static let readWriteProtect = Self(rawValue: 1 << 3)

  /// The modes by their short names.
  public var names: [String] { flagNames(rawValue, ["MISSING", "WP", "MINOR", "RWP"]) }

  /// The names, joined by "|".
  public var description: String { names.joined(separator: "|") }
}

/// Which ioctls the kernel offers on a registered range.
///
/// The mask is advice: the kernel also does a COPY on a range registered MINOR only.
public struct RangeOperations: OptionSet, Hashable, Sendable, CustomStringConvertible {
  /// The kernel's bits; bit N is ioctl number N.
  public let rawValue: UInt64

  /// Wraps the kernel's bits.
  public init(rawValue: UInt64) { self.rawValue = rawValue }

  /// UFFDIO_WAKE.
  public static let wake = Self(rawValue: 1 << 2)
  /// UFFDIO_COPY.
  public static let copy = Self(rawValue: 1 << 3)
  /// UFFDIO_ZEROPAGE.
  public static let zeropage = Self(rawValue: 1 << 4)
  /// UFFDIO_MOVE.
  public static let move = Self(rawValue: 1 << 5)
  /// UFFDIO_WRITEPROTECT.
  public static let writeProtect = Self(rawValue: 1 << 6)
  /// UFFDIO_CONTINUE.
  public static let `continue` = Self(rawValue: 1 << 7)
  /// UFFDIO_POISON.
  public static let poison = Self(rawValue: 1 << 8)
  /// UFFDIO_RWPROTECT.
  public static let readWriteProtect = Self(rawValue: 1 << 9)

  /// The operations by the kernel's names without UFFDIO_.
  public var names: [String] {
    flagNames(
      rawValue,
      [
        "REGISTER", "UNREGISTER", "WAKE", "COPY", "ZEROPAGE", "MOVE", "WRITEPROTECT", "CONTINUE",
        "POISON", "RWPROTECT", "SET_MODE",
      ])
  }

  /// The names, separated by blanks.
  public var description: String { names.joined(separator: " ") }
}
