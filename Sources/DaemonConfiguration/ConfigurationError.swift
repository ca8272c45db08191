// SPDX-License-Identifier: Apache-2.0

public import SystemPackage

/// Why a configuration cannot be used, and where in the file.
public struct ConfigurationError: Error, Sendable, CustomStringConvertible {
  /// The kind of failure. A struct, so that kinds can be added.
  public struct Code: Hashable, Sendable {
    private enum Kind { case unreadable, syntax, unknownKey, wrongType, invalidValue, missingKey }
    private let kind: Kind
    private init(_ kind: Kind) { self.kind = kind }

    /// The file cannot be read.
    public static let unreadable = Self(.unreadable)
    /// It is not YAML, or uses more of it than is allowed here.
    public static let syntax = Self(.syntax)
    /// A key that does not exist, or not here.
    public static let unknownKey = Self(.unknownKey)
    /// A list where a value is expected, and the like.
    public static let wrongType = Self(.wrongType)
    /// A value that is not allowed.
    public static let invalidValue = Self(.invalidValue)
    /// A key that must be there.
    public static let missingKey = Self(.missingKey)
  }

  /// The kind of failure.
  public let code: Code
  /// The file, as it was named.
  public let file: String
  /// From 1; `nil` when it is about the whole file.
  public let line: Int?
  /// From 1, in Unicode scalars.
  public let column: Int?
  /// What is wrong and what is allowed, in words.
  public let reason: String
  /// What the kernel said, if it was asked.
  public let errno: Errno?

  init(
    _ code: Code, file: String, line: Int? = nil, column: Int? = nil, _ reason: String,
    errno: Errno? = nil
  ) {
    self.code = code
    self.file = file
    self.line = line
    self.column = column
    self.reason = reason
    self.errno = errno
  }

  /// "FILE:LINE:COLUMN: what is wrong, and what is allowed".
  public var description: String {
    var text = file
    if let line { text += ":\(line)" }
    if let column { text += ":\(column)" }
    text += ": \(reason)"
    if let errno { text += ": \(errno)" }
    return text
  }
}
