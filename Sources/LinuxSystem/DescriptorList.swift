// SPDX-License-Identifier: Apache-2.0

internal import CLinux
public import SystemPackage

/// The one owner of several descriptors, such as those that came with a message; all that
/// were not taken out are closed when it goes away.
public struct DescriptorList: ~Copyable, Sendable {
  private var numbers: [CInt] = []

  /// An empty list.
  public init() {}

  deinit {
    for number in numbers { _ = clinux_close(number) }
  }

  /// How many it owns.
  public var count: Int { numbers.count }

  /// Whether it owns none.
  public var isEmpty: Bool { numbers.isEmpty }

  /// The numbers, in their order; they stay the list's.
  public var rawValues: [CInt] { numbers }

  /// Takes ownership of open descriptors.
  public mutating func append(owning rawValues: [CInt]) { numbers += rawValues }

  /// Takes the first one out; `nil` when there is none.
  public mutating func takeFirst() -> OwnedDescriptor? {
    numbers.isEmpty ? nil : OwnedDescriptor(owning: numbers.removeFirst())
  }

  /// fstat(2) of one of them.
  public func status(of index: Int) throws(Errno) -> FileStatus {
    try FileStatus(ofDescriptor: numbers[index])
  }
}
