// SPDX-License-Identifier: Apache-2.0

internal import DaemonConfiguration
internal import Foundation
internal import Logging

/// Makes a line of a message: for people, or a JSON object. What came from a VMM may be in it, so
/// it has no control character, none that changes a text's direction, and an end.
struct LogText: Sendable {
  /// Bytes of a line, with its end.
  static let lineLimit = 4096
  /// Bytes of a message of these; the rest is for what comes with it.
  private static let messageLimit = 2500
  private static let valueLimit = 600
  /// For the words that something is missing, and what ends a line.
  private static let markRoom = 40

  let format: LogFormat
  /// systemd notes the time by itself.
  let hasTime: Bool

  func line(
    _ level: Logger.Level, _ message: String, _ metadata: Logger.Metadata = [:]
  ) -> [UInt8] {
    var line: [UInt8] = []
    line.reserveCapacity(256)
    let values = metadata.sorted { $0.key < $1.key }
    switch format {
    case .text:
      if hasTime { line += Array((Self.time() + " ").utf8) }
      line += Array("\(level.rawValue): ".utf8)
      append(message, to: &line, limit: Self.messageLimit)
      for (key, value) in values {
        line += Array(" \(key)=".utf8)
        append("\(value)", to: &line, limit: Self.valueLimit)
      }
    case .json:
      var fields = values.map { ($0.key, "\($0.value)") }
      fields.append(("level", level.rawValue))
      fields.append(("time", Self.time()))
      line.append(UInt8(ascii: "{"))
      for (key, value) in fields {
        line += Array("\"\(key)\":\"".utf8)
        append(value, to: &line, limit: Self.valueLimit)
        line += Array("\",".utf8)
      }
      line += Array("\"message\":\"".utf8)
      append(message, to: &line, limit: Self.messageLimit)
      line += Array("\"}".utf8)
    }
    line.append(UInt8(ascii: "\n"))
    return line
  }

  private static func time() -> String {
    Date().formatted(.iso8601.time(includingFractionalSeconds: true))
  }

  /// Adds a text, at most some bytes of it, and no more than the line has room for.
  private func append(_ text: String, to line: inout [UInt8], limit: Int) {
    let end = min(line.count + limit, Self.lineLimit - Self.markRoom)
    var taken = 0
    for scalar in text.unicodeScalars {
      let before = line.count
      append(scalar, to: &line)
      guard line.count <= end else {
        line.removeSubrange(before...)
        line += Array("… (\(text.utf8.count - taken) bytes more)".utf8)
        return
      }
      taken += UTF8.width(scalar)
    }
  }

  private func append(_ scalar: Unicode.Scalar, to line: inout [UInt8]) {
    switch scalar.value {
    case 0x22 where format == .json, 0x5c where format == .json:
      line += [UInt8(ascii: "\\"), UInt8(scalar.value)]
    case 0x20...0x7e: line.append(UInt8(scalar.value))
    case 0x09: line += Array("\\t".utf8)
    case 0x0a: line += Array("\\n".utf8)
    case 0x0d: line += Array("\\r".utf8)
    default:
      switch scalar.properties.generalCategory {
      case .control, .format, .lineSeparator, .paragraphSeparator, .surrogate:
        guard format == .json else {
          line += Array("\\u{\(String(scalar.value, radix: 16))}".utf8)
          return
        }
        for unit in String(scalar).utf16 {
          let digits = String(unit, radix: 16)
          line += Array(("\\u" + String(repeating: "0", count: 4 - digits.count) + digits).utf8)
        }
      default: line += Array(String(scalar).utf8)
      }
    }
  }
}
