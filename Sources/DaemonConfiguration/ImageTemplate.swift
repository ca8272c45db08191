// SPDX-License-Identifier: Apache-2.0

/// The path of an image, with places that depend on who asks: `{image}`, `{name}`, `{uid}`,
/// `{pid}`.
///
/// What a VMM says goes into a path only after a check, so that it cannot leave the
/// directory that the template names.
public struct ImageTemplate: Sendable, Hashable, CustomStringConvertible {
  /// What is known of a VMM.
  public struct Values: Sendable, Hashable {
    /// The image that it asks for (docs/handover.md).
    public var image: String?
    /// What it calls itself.
    public var name: String?
    /// Its user.
    public var userID: UInt32
    /// Its process.
    public var processID: Int32

    /// What is known of a VMM.
    public init(image: String? = nil, name: String? = nil, userID: UInt32, processID: Int32) {
      self.image = image
      self.name = name
      self.userID = userID
      self.processID = processID
    }
  }

  enum Part: Sendable, Hashable {
    case text(String)
    case image, name, userID, processID
  }

  /// As it was written.
  public let description: String
  let parts: [Part]

  static let places: [(name: String, part: Part)] = [
    ("image", .image), ("name", .name), ("uid", .userID), ("pid", .processID),
  ]

  /// Reads a template; `nil` for an unknown place or a brace too many.
  public init?(_ text: String) {
    var parts: [Part] = []
    var rest = text[...]
    while let brace = rest.firstIndex(where: { $0 == "{" || $0 == "}" }) {
      guard rest[brace] == "{", let end = rest[brace...].firstIndex(of: "}"),
        let place = Self.places.first(where: { $0.name == rest[rest.index(after: brace)..<end] })
      else { return nil }
      if brace > rest.startIndex { parts.append(.text(String(rest[..<brace]))) }
      parts.append(place.part)
      rest = rest[rest.index(after: end)...]
    }
    if !rest.isEmpty { parts.append(.text(String(rest))) }
    guard !parts.isEmpty else { return nil }
    self.parts = parts
    description = text
  }

  /// Whether the image depends on what a VMM says in docs/handover.md.
  public var asksTheVMM: Bool { parts.contains(.image) || parts.contains(.name) }

  /// The path, where it is the same for every VMM.
  public var fixedPath: String? {
    if case .text(let text) = parts.first, parts.count == 1 { text } else { nil }
  }

  /// The path for a VMM; `nil` when it did not say what the template needs, or said
  /// something that is no plain file name.
  public func path(for values: Values) -> String? {
    var path = ""
    for part in parts {
      switch part {
      case .text(let text): path += text
      case .userID: path += "\(values.userID)"
      case .processID: path += "\(values.processID)"
      case .image:
        guard let image = values.image, Self.isFileName(image) else { return nil }
        path += image
      case .name:
        guard let name = values.name, Self.isFileName(name) else { return nil }
        path += name
      }
    }
    return path
  }

  /// Letters, digits, and `. _ -`, not beginning with a dot.
  static func isFileName(_ text: String) -> Bool {
    (1...255).contains(text.utf8.count) && !text.hasPrefix(".")
      && text.unicodeScalars.allSatisfy { scalar in
        scalar.isASCII
          && (scalar.properties.isAlphabetic || ("0"..."9").contains(scalar) || scalar == "."
            || scalar == "_" || scalar == "-")
      }
  }
}
