// SPDX-License-Identifier: Apache-2.0

/// Finds where a JSON array ends in a stream that says no length. It looks at brackets and
/// strings only: what is inside is for the decoder to judge.
struct JSONExtent {
  /// Deeper nesting than a hand-over has, a few times over.
  static let depthLimit = 16

  enum Progress: Equatable {
    /// More bytes are needed.
    case incomplete
    /// The array ends before this byte.
    case ends(at: Int)
    /// It is no array, or nested too deep.
    case impossible(String)
  }

  private var position = 0
  private var depth = 0
  private var isInString = false
  private var isEscaped = false

  /// Goes on over the bytes that are new; `bytes` is the whole message so far.
  mutating func scan(_ bytes: [UInt8]) -> Progress {
    while position < bytes.count {
      let byte = bytes[position]
      position += 1
      if isInString {
        if isEscaped {
          isEscaped = false
        } else if byte == UInt8(ascii: "\\") {
          isEscaped = true
        } else if byte == UInt8(ascii: "\"") {
          isInString = false
        }
        continue
      }
      switch byte {
      case UInt8(ascii: " "), UInt8(ascii: "\n"), UInt8(ascii: "\r"), UInt8(ascii: "\t"): continue
      case UInt8(ascii: "["), UInt8(ascii: "{"):
        guard depth > 0 || byte == UInt8(ascii: "[") else { return Self.notAnArray }
        depth += 1
        guard depth <= Self.depthLimit else {
          return .impossible("its JSON is nested deeper than \(Self.depthLimit)")
        }
      case UInt8(ascii: "]"), UInt8(ascii: "}"):
        guard depth > 0 else { return Self.notAnArray }
        depth -= 1
        if depth == 0 { return .ends(at: position) }
      case UInt8(ascii: "\"") where depth > 0: isInString = true
      default:
        guard depth > 0 else { return Self.notAnArray }
      }
    }
    return .incomplete
  }

  private static let notAnArray = Progress.impossible("it does not begin with a JSON array")
}
