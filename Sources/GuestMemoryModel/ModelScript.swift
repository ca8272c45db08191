// SPDX-License-Identifier: Apache-2.0

/// A line of a script that cannot be understood.
public struct ModelScriptError: Error, Hashable, Sendable, CustomStringConvertible {
  /// The line's number, from 1.
  public var line: Int
  /// What is wrong and what would be right.
  public var reason: String

  /// "line 3: …".
  public var description: String { "line \(line): \(reason)" }
}

/// The script language of `faultline model` (docs/semantics.md): one step in a line.
///
/// The lines that set the scene come first; the first step fixes it.
public struct ModelScript: Sendable {
  /// What a line asks for.
  public enum Command: Hashable, Sendable {
    /// Nothing: an empty line or a comment.
    case none
    /// A part of the scene.
    case scene
    /// A step.
    case step(Operation)
  }

  /// The scene so far.
  public private(set) var setup: Setup
  private var hasSteps = false
  private var line = 0
  private var tag: UInt64 = 100

  /// The greatest number of pages: a picture has to fit a terminal.
  public static let mostPages = 16

  /// A script that starts from four pages of guest_memfd with the project's kernel.
  public init() {
    setup = Setup(.guestMemfd, kernel: .faultline, objectPages: 4)
  }

  /// Understands the next line.
  public mutating func parse(_ text: String) throws(ModelScriptError) -> Command {
    line += 1
    let words = text.prefix { $0 != "#" }.split(whereSeparator: \.isWhitespace).map(String.init)
    guard let verb = words.first else { return .none }
    var rest = Arguments(words: words[1...], line: line, setup: setup)
    if try setScene(verb, &rest) {
      try rest.end()
      return .scene
    }
    let operation = try step(verb, &rest)
    try rest.end()
    hasSteps = true
    return .step(operation)
  }

  // MARK: - The scene

  private mutating func setScene(
    _ verb: String, _ rest: inout Arguments
  ) throws(ModelScriptError) -> Bool {
    switch verb {
    case "memory":
      let name = try rest.word("the kind of memory")
      guard let memory = ModelMemory.allCases.first(where: { $0.name == name }) else {
        let names = ModelMemory.allCases.map(\.name).joined(separator: ", ")
        throw rest.error("there is no memory \"\(name)\"; there are \(names)")
      }
      setup = Setup(memory, kernel: setup.kernel, objectPages: setup.objectPages)
    case "kernel":
      let name = try rest.word("the kernel")
      guard let kernel = KernelVariant(name: name) else {
        let names = KernelVariant.all.map(\.name).joined(separator: ", ")
        throw rest.error("there is no kernel \"\(name)\"; there are \(names)")
      }
      setup.kernel = kernel
    case "pages":
      let count = try rest.number("how many pages")
      guard (1...Self.mostPages).contains(count) else {
        throw rest.error("a scene has 1 to \(Self.mostPages) pages")
      }
      setup = Setup(setup.memory, kernel: setup.kernel, objectPages: count)
    default: return false
    }
    if hasSteps { throw rest.error("\(verb) comes before the first step") }
    return true
  }

  // MARK: - Steps

  private mutating func step(
    _ verb: String, _ rest: inout Arguments
  ) throws(ModelScriptError) -> Operation {
    switch verb {
    case "register":
      let modes = try rest.modes()
      return .register(try rest.span(), modes)
    case "unregister": return .unregister(try rest.span())
    case "copy":
      let span = try rest.span()
      let tag = try rest.value(default: nextTag(span.count))
      let writeProtected = rest.take("wp")
      return .copy(span, tag: tag, writeProtected: writeProtected, wakes: !rest.take("dontwake"))
    case "zeropage": return .zeropage(try rest.span(), wakes: !rest.take("dontwake"))
    case "continue": return .continue(try rest.span(), wakes: !rest.take("dontwake"))
    case "poison": return .poison(try rest.span(), wakes: !rest.take("dontwake"))
    case "protect": return .writeProtect(try rest.span(), enabled: true)
    case "unprotect":
      return .writeProtect(try rest.span(), enabled: false, wakes: !rest.take("dontwake"))
    case "wake": return .wake(try rest.span())
    case "dontneed": return .dontNeed(try rest.span())
    case "read", "write":
      let place = try rest.span()
      guard place.count == 1 else { throw rest.error("\(verb) takes one page") }
      let access = try access(verb, &rest)
      return .touch(mapping: place.mapping, page: place.first, access)
    case "vcpu": return try vcpuStep(&rest)
    case "bit":
      let page = try rest.objectPage()
      switch try rest.word("on or off") {
      case "on": return .setUserfaultBit(page: page, true)
      case "off": return .setUserfaultBit(page: page, false)
      case let other: throw rest.error("\"\(other)\" is neither on nor off")
      }
    case "pwrite":
      let pages = try rest.objectPages()
      let tag = try rest.value(default: nextTag(pages.count))
      var readable = pages.count
      if rest.take("readable") { readable = try rest.number("how many pages can be read") }
      return .write(first: pages.lowerBound, count: pages.count, tag: tag, readable: readable)
    case "fallocate":
      let pages = try rest.objectPages()
      return .allocate(first: pages.lowerBound, count: pages.count)
    case "punch":
      let pages = try rest.objectPages()
      return .punchHole(first: pages.lowerBound, count: pages.count)
    default:
      throw rest.error("there is no step \"\(verb)\"; `faultline model --help` lists them")
    }
  }

  private mutating func vcpuStep(_ rest: inout Arguments) throws(ModelScriptError) -> Operation {
    let verb = try rest.word("read or write")
    guard verb == "read" || verb == "write" else {
      throw rest.error("a vCPU can read or write, not \"\(verb)\"")
    }
    let page = try rest.objectPage()
    return .vcpuTouch(page: page, try access(verb, &rest))
  }

  private mutating func access(
    _ verb: String, _ rest: inout Arguments
  ) throws(ModelScriptError) -> Access {
    verb == "read" ? .read : .write(try rest.value(default: nextTag(1)))
  }

  /// A content that no page had before.
  private mutating func nextTag(_ count: Int) -> UInt64 {
    defer { tag += UInt64(max(1, count)) }
    return tag
  }
}

/// The words of a line after its verb.
private struct Arguments {
  private var words: ArraySlice<String>
  private let line: Int
  private let setup: Setup

  init(words: ArraySlice<String>, line: Int, setup: Setup) {
    (self.words, self.line, self.setup) = (words, line, setup)
  }

  func error(_ reason: String) -> ModelScriptError { ModelScriptError(line: line, reason: reason) }

  func end() throws(ModelScriptError) {
    if let word = words.first { throw error("\"\(word)\" is too much") }
  }

  mutating func take(_ word: String) -> Bool {
    guard words.first == word else { return false }
    words.removeFirst()
    return true
  }

  mutating func word(_ what: String) throws(ModelScriptError) -> String {
    guard let word = words.popFirst() else { throw error("\(what) is missing") }
    return word
  }

  mutating func number(_ what: String) throws(ModelScriptError) -> Int {
    let word = try word(what)
    guard let number = Int(word), number >= 0 else {
      throw error("\"\(word)\" is not a number: \(what)")
    }
    return number
  }

  /// A content, where the line gives one.
  mutating func value(default fallback: UInt64) throws(ModelScriptError) -> UInt64 {
    guard let word = words.first, word.first?.isNumber == true else { return fallback }
    guard let value = UInt64(word), value < 1 << 32 else {
      throw error("a content is a number below 2^32, not \"\(word)\"")
    }
    words.removeFirst()
    return value
  }

  mutating func modes() throws(ModelScriptError) -> ModelModes {
    var modes: ModelModes = []
    for name in try word("the modes, such as missing+minor").split(separator: "+") {
      switch name {
      case "missing": modes.insert(.missing)
      case "minor": modes.insert(.minor)
      case "wp": modes.insert(.writeProtect)
      default: throw error("there is no mode \"\(name)\"; there are missing, minor and wp")
      }
    }
    return modes
  }

  /// `3`, `0-3` or `all`, then `@1` for the second mapping.
  mutating func span() throws(ModelScriptError) -> Span {
    let pages = try range(upTo: setup.mappingPages)
    var mapping = 0
    if let word = words.first, word.hasPrefix("@") {
      guard let number = Int(word.dropFirst()), setup.mappings.indices.contains(number) else {
        throw error("there is no mapping \(word); there are @0 to @\(setup.mappings.count - 1)")
      }
      mapping = number
      words.removeFirst()
    }
    return Span(mapping, pages.lowerBound, pages.count)
  }

  mutating func objectPages() throws(ModelScriptError) -> Range<Int> {
    try range(upTo: setup.objectPages)
  }

  mutating func objectPage() throws(ModelScriptError) -> Int {
    let pages = try objectPages()
    guard pages.count == 1 else { throw error("one page is meant here") }
    return pages.lowerBound
  }

  private mutating func range(upTo limit: Int) throws(ModelScriptError) -> Range<Int> {
    // All of the object; what lies beyond its end is asked for by number.
    if take("all") { return 0..<setup.objectPages }
    let word = try word("the page")
    let ends = word.split(separator: "-", omittingEmptySubsequences: false).map { Int($0) }
    guard ends.count <= 2, let first = ends[0], let last = ends[ends.count - 1], first <= last,
      last < limit
    else {
      throw error("\"\(word)\" is no page or range of pages from 0 to \(limit - 1)")
    }
    return first..<(last + 1)
  }
}
