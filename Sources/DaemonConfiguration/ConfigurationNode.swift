// SPDX-License-Identifier: Apache-2.0

internal import Yams

/// A node of the file with what its errors need.
struct ConfigurationNode {
  let node: Node
  let file: String
  /// What it is called, for errors.
  let name: String

  func error(_ code: ConfigurationError.Code, _ reason: String) -> ConfigurationError {
    ConfigurationError(
      code, file: file, line: node.mark?.line, column: node.mark?.column, reason)
  }

  private func child(_ node: Node, _ name: String) -> Self {
    Self(node: node, file: file, name: name)
  }

  // MARK: - Structure

  /// The values of a mapping by their keys; all keys are known ones.
  func values(allowed: [String]) throws(ConfigurationError) -> ConfigurationValues {
    guard case .mapping(let mapping) = node else {
      throw error(.wrongType, "\(name) must have keys and values, such as \"\(allowed[0]): …\"")
    }
    var values: [String: ConfigurationNode] = [:]
    for (key, value) in mapping {
      let key = child(key, "a key")
      let text = try key.text()
      guard allowed.contains(text) else {
        let nearest = NearestName.of(text, among: allowed)
        throw key.error(
          .unknownKey,
          "\"\(text)\" is not a key of \(name)"
            + (nearest.map { "; did you mean \"\($0)\"?" }
              ?? "; there are: \(allowed.joined(separator: ", "))"))
      }
      // Yams has looked for this, but takes keys with different tags for different keys.
      guard values.updateValue(child(value, text), forKey: text) == nil else {
        throw key.error(.syntax, "\"\(text)\" is there twice")
      }
    }
    return ConfigurationValues(mapping: self, values: values)
  }

  /// The elements of a list that is not empty.
  func elements() throws(ConfigurationError) -> [ConfigurationNode] {
    guard case .sequence(let sequence) = node else {
      throw error(.wrongType, "\(name) must be a list")
    }
    guard !sequence.isEmpty else { throw error(.invalidValue, "\(name) is empty") }
    return sequence.map { child($0, "an element of \(name)") }
  }

  // MARK: - Values

  /// A value as it is written.
  func text() throws(ConfigurationError) -> String {
    guard case .scalar(let scalar) = node else {
      throw error(.wrongType, "\(name) must be a single value")
    }
    return scalar.string
  }

  /// A value that `read` understands.
  func value<Value>(
    _ allowed: String, _ read: (String) -> Value?
  ) throws(ConfigurationError) -> Value {
    let text = try text()
    guard let value = read(text) else {
      throw error(.invalidValue, "\(name) is \"\(text)\", and must be \(allowed)")
    }
    return value
  }

  /// One of some words.
  func word<Word: RawRepresentable & CaseIterable>() throws(ConfigurationError) -> Word
  where Word.RawValue == String {
    let words = Word.allCases.map(\.rawValue)
    let allowed = words.dropLast().joined(separator: ", ") + " or " + (words.last ?? "")
    return try value(allowed) { Word(rawValue: $0) }
  }

  /// true or false, also as yes, no, on, off.
  func flag() throws(ConfigurationError) -> Bool {
    try value("true or false") { text in
      switch text.lowercased() {
      case "true", "yes", "on": true
      case "false", "no", "off": false
      default: nil
      }
    }
  }

  /// A whole number in a range.
  func number(_ range: ClosedRange<Int>) throws(ConfigurationError) -> Int {
    try value("\(range.lowerBound) to \(range.upperBound)") { text in
      Int(text).flatMap { range.contains($0) ? $0 : nil }
    }
  }

  /// Bytes, such as 4096, 256M or 10GiB.
  func bytes(_ range: ClosedRange<Int>) throws(ConfigurationError) -> Int {
    let least = range.lowerBound >= 1 << 20 ? "at least \(range.lowerBound >> 20)M and " : ""
    let limits = "\(least)at most \(range.upperBound >> 40)T"
    return try value("a number of bytes such as 64M or 10G, \(limits)") { text in
      Quantity.bytes(text).flatMap { range.contains($0) ? $0 : nil }
    }
  }

  /// Milliseconds, of a text such as 500ms, 30s or 5m.
  func milliseconds(_ range: ClosedRange<Int>) throws(ConfigurationError) -> Int {
    let limits = "\(range.lowerBound)ms to \(range.upperBound / 1000)s"
    return try value("a time such as 500ms, 30s or 5m, \(limits)") { text in
      Quantity.milliseconds(text).flatMap { range.contains($0) ? $0 : nil }
    }
  }

  /// An absolute path of at most some bytes.
  func path(limit: Int = 4095) throws(ConfigurationError) -> String {
    try value("an absolute path of at most \(limit) bytes") { text in
      text.hasPrefix("/") && text.utf8.count <= limit && !text.utf8.contains(0) ? text : nil
    }
  }
}

/// The values of a mapping.
struct ConfigurationValues {
  let mapping: ConfigurationNode
  let values: [String: ConfigurationNode]

  subscript(key: String) -> ConfigurationNode? { values[key] }

  func required(_ key: String) throws(ConfigurationError) -> ConfigurationNode {
    guard let value = values[key] else {
      throw mapping.error(.missingKey, "\(mapping.name) has no \"\(key)\"")
    }
    return value
  }
}
