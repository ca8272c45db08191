// SPDX-License-Identifier: Apache-2.0

/// Why a guest could not be saved or restored.
public struct SnapshotError: Error, Sendable, CustomStringConvertible {
  /// The kind of failure. A struct, so that kinds can be added.
  public struct Code: Hashable, Sendable {
    private enum Kind { case image, guest, memory, pager, tracking }
    private let kind: Kind
    private init(_ kind: Kind) { self.kind = kind }

    /// The image cannot be read or written, or is none of a test guest.
    public static let image = Self(.image)
    /// The guest cannot be made, or failed.
    public static let guest = Self(.guest)
    /// The machine cannot give the memory.
    public static let memory = Self(.memory)
    /// userfaultfd or the pager refused.
    public static let pager = Self(.pager)
    /// The guest's writes cannot be tracked, or not as they would have to be.
    public static let tracking = Self(.tracking)
  }

  /// The kind of failure.
  public let code: Code
  /// What failed, why, and what to do about it.
  public let description: String

  /// An error with its text.
  public init(_ code: Code, _ description: String) {
    self.code = code
    self.description = description
  }
}
