// SPDX-License-Identifier: Apache-2.0

/// What is taken from a peer before it is refused.
public struct HandoverLimits: Sendable, Hashable {
  /// Bytes of a message. A region of Firecracker's takes about 120.
  public var messageBytes: Int
  /// Regions in a message.
  public var regions: Int
  /// From the first wait to the end of the message, in milliseconds.
  public var timeoutMilliseconds: Int

  /// Limits; the defaults suit every VMM that is known.
  public init(
    messageBytes: Int = 256 << 10, regions: Int = 1024, timeoutMilliseconds: Int = 5000
  ) {
    self.messageBytes = max(1, messageBytes)
    self.regions = max(1, regions)
    self.timeoutMilliseconds = min(max(0, timeoutMilliseconds), Int(Int32.max))
  }

  /// Addresses of a process end below this (x86-64 with 5-level paging).
  static let addressSpaceEnd: UInt64 = 1 << 56
  /// Guest-physical addresses and offsets into memory files end at or below this.
  static let contentEnd: UInt64 = 1 << 52
  /// Bytes of a memory file that no region maps may lie between those that regions do: so many,
  /// and as many again as regions map.
  static let memoryGap = 1 << 30
}
