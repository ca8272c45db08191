// SPDX-License-Identifier: Apache-2.0

/// Numbers with a unit.
enum Quantity {
  /// Bytes of a text such as 4096, 64K, 256M, 10GiB; `nil` if it is none or too large.
  static func bytes(_ text: String) -> Int? {
    let units: [(suffix: String, factor: Int)] = [
      ("", 1), ("k", 1 << 10), ("m", 1 << 20), ("g", 1 << 30), ("t", 1 << 40),
    ]
    var (digits, suffix) = split(text.lowercased())
    for ending in ["ib", "b"] where suffix.hasSuffix(ending) {
      suffix = suffix.dropLast(ending.count)
      break
    }
    return product(digits, units.first { $0.suffix == suffix }?.factor)
  }

  /// Milliseconds of a text such as 500ms, 30s, 5m, 1h; `nil` if it is none or too large.
  static func milliseconds(_ text: String) -> Int? {
    let units = ["ms": 1, "s": 1000, "m": 60_000, "h": 3_600_000]
    let (digits, suffix) = split(text)
    return product(digits, units[String(suffix)])
  }

  private static func split(_ text: String) -> (digits: String, suffix: Substring) {
    let digits = text.prefix { ("0"..."9").contains($0) }
    return (String(digits), text[digits.endIndex...])
  }

  private static func product(_ digits: String, _ factor: Int?) -> Int? {
    guard let number = Int(digits), let factor else { return nil }
    let (result, overflow) = number.multipliedReportingOverflow(by: factor)
    return overflow ? nil : result
  }
}

/// Finds what somebody meant to write.
enum NearestName {
  /// The name with the fewest changes, if they are few for its length.
  static func of(_ text: String, among names: [String]) -> String? {
    let text = text.lowercased().replacing("_", with: "-")
    // Long texts cost time and are like nothing.
    guard text.count <= 64 else { return nil }
    let best = names.map { (name: $0, distance: distance(text, $0)) }.min {
      $0.distance < $1.distance
    }
    guard let best, best.distance <= max(1, best.name.count / 3) else { return nil }
    return best.name
  }

  /// Levenshtein's: insertions, deletions and replacements.
  static func distance(_ left: String, _ right: String) -> Int {
    let right = Array(right)
    var row = Array(0...right.count)
    for (index, character) in left.enumerated() {
      var diagonal = row[0]
      row[0] = index + 1
      for column in right.indices {
        let replaced = diagonal + (right[column] == character ? 0 : 1)
        diagonal = row[column + 1]
        row[column + 1] = min(replaced, diagonal + 1, row[column] + 1)
      }
    }
    return row[right.count]
  }
}
