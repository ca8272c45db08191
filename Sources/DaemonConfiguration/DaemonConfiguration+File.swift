// SPDX-License-Identifier: Apache-2.0

internal import LinuxSystem
public import SystemPackage
internal import Yams

extension DaemonConfiguration {
  /// Bytes of a configuration file.
  public static let fileLimit = 1 << 20

  /// Reads a file. Throws at the first thing that is wrong.
  public init(file path: FilePath) throws(ConfigurationError) {
    let bytes: [UInt8]
    do throws(Errno) {
      bytes = try Self.contents(of: path)
    } catch {
      let reason =
        error == .fileTooLarge
        ? "it has more than \(Self.fileLimit) bytes" : "it cannot be read"
      throw ConfigurationError(
        .unreadable, file: path.string, reason, errno: error == .fileTooLarge ? nil : error)
    }
    guard let text = String(validating: bytes, as: UTF8.self) else {
      throw ConfigurationError(.syntax, file: path.string, "it is not UTF-8")
    }
    try self.init(yaml: text, file: path.string)
  }

  /// Reads a text; `file` is the name for errors.
  public init(yaml text: String, file: String) throws(ConfigurationError) {
    let root = ConfigurationNode(
      node: try Self.compose(text, file: file), file: file, name: "the file")
    let sessionKeys = SessionConfiguration.keys
    let values = try root.values(
      allowed: [
        "listen", "control-socket", "metrics", "fault-threads", "max-sessions", "cache-size",
        "drain-timeout", "log-level", "log-format",
      ] + sessionKeys)
    let defaults = try SessionConfiguration().changed(by: values)
    var listen: [ListenConfiguration] = []
    var paths: Set<String> = []
    for element in try values.required("listen").elements() {
      let socket = try ListenConfiguration(element, defaults: defaults)
      guard paths.insert(socket.socket).inserted else {
        throw element.error(.invalidValue, "the socket \(socket.socket) is in the list twice")
      }
      listen.append(socket)
    }
    self.init(listen: listen)
    controlSocket = try values["control-socket"]?.path(limit: ListenConfiguration.pathLimit)
    if let control = controlSocket, paths.contains(control), let node = values["control-socket"] {
      throw node.error(.invalidValue, "control-socket is one of the sockets for VMMs")
    }
    metricsAddress = try values["metrics"]?.value(
      "HOST:PORT, such as 127.0.0.1:9090 or [::1]:9090"
    ) { NetworkAddress($0) }
    faultThreads = try values["fault-threads"]?.number(1...64) ?? faultThreads
    maximumSessions = try values["max-sessions"]?.number(1...65_536) ?? maximumSessions
    cacheLimit = try values["cache-size"]?.bytes(1 << 20...1 << 50)
    drainTimeoutMilliseconds =
      try values["drain-timeout"]?.milliseconds(100...86_400_000) ?? drainTimeoutMilliseconds
    logLevel = try values["log-level"]?.word() ?? logLevel
    logFormat = try values["log-format"]?.word() ?? logFormat
  }

  // MARK: - YAML

  private static func compose(_ text: String, file: String) throws(ConfigurationError) -> Node {
    let node: Node?
    do {
      // UTF-8 whatever the environment says, which Yams would look at otherwise.
      node = try Parser(yaml: text, encoding: .utf8).singleRoot()
    } catch {
      throw syntaxError(error, file: file)
    }
    guard let node else {
      throw ConfigurationError(.missingKey, file: file, "it is empty; it needs at least \"listen\"")
    }
    return node
  }

  private static func syntaxError(_ error: any Error, file: String) -> ConfigurationError {
    switch error as? YamlError {
    case .scanner(_, let problem, let mark, _), .parser(_, let problem, let mark, _),
      .composer(_, let problem, let mark, _):
      ConfigurationError(
        .syntax, file: file, line: mark.line, column: mark.column, "it is not YAML: \(problem)")
    case .reader(let problem, _, _, _):
      ConfigurationError(.syntax, file: file, "it is not YAML: \(problem)")
    case .duplicatedKeysInMapping(let keys, let context):
      ConfigurationError(
        .syntax, file: file, line: context.mark.line, column: context.mark.column,
        "\"\(keys.first ?? "")\" is there twice")
    default: ConfigurationError(.syntax, file: file, "it is not YAML")
    }
  }

  private static func contents(of path: FilePath) throws(Errno) -> [UInt8] {
    let file = try OwnedDescriptor(openingForReading: path)
    guard try !file.status.isDirectory else { throw .isDirectory }
    var bytes = [UInt8](repeating: 0, count: fileLimit + 1)
    var count = 0
    while count < bytes.count {
      let done = count
      let read = unsafe bytes.withUnsafeMutableBytes { room in
        Result { () throws(Errno) in
          try unsafe file.read(into: .init(rebasing: room[done...]), at: done)
        }
      }
      guard try read.get() > 0 else { break }
      count += try read.get()
    }
    guard count <= fileLimit else { throw .fileTooLarge }
    return Array(bytes.prefix(count))
  }
}

extension ListenConfiguration {
  /// Bytes of a socket's path (unix(7), sun_path without its end).
  static let pathLimit = 107

  init(_ node: ConfigurationNode, defaults: SessionConfiguration) throws(ConfigurationError) {
    let values = try node.values(
      allowed: ["socket", "handover", "image", "mode", "allow-uid"] + SessionConfiguration.keys)
    let image = try values.required("image")
    self.init(
      socket: try values.required("socket").path(limit: Self.pathLimit),
      image: try image.value(
        "an absolute path, in which {image}, {name}, {uid} and {pid} stand for what the VMM is"
      ) { $0.hasPrefix("/") ? ImageTemplate($0) : nil })
    handover = try values["handover"]?.word() ?? handover
    guard handover == .faultline || !self.image.asksTheVMM else {
      throw image.error(
        .invalidValue, "image has {image} or {name}, which Firecracker does not say")
    }
    mode =
      try values["mode"]?.value("octal permissions such as 0660") { text -> UInt16? in
        let digits = text.hasPrefix("0o") ? text.dropFirst(2) : text[...]
        guard digits.allSatisfy({ ("0"..."7").contains($0) }) else { return nil }
        return UInt16(digits, radix: 8).flatMap { $0 <= 0o777 ? $0 : nil }
      } ?? mode
    if let users = values["allow-uid"] {
      var allowed: Set<UInt32> = []
      for user in try users.elements() {
        allowed.insert(UInt32(try user.number(0...Int(UInt32.max) - 1)))
      }
      allowedUsers = allowed
    }
    sessions = try defaults.changed(by: values)
  }
}

extension SessionConfiguration {
  /// What `source-timeout` may be, in milliseconds.
  static let sourceTimeouts = 100...3_600_000

  /// Milliseconds of a `source-timeout` such as 500ms, 30s or 5m; `nil` when it is none, or not
  /// from 100ms to 1h.
  public static func sourceTimeout(_ text: String) -> Int? {
    Quantity.milliseconds(text).flatMap { sourceTimeouts.contains($0) ? $0 : nil }
  }

  static let keys = ["fill-rate", "record", "source-timeout", "on-damage"]

  func changed(by values: ConfigurationValues) throws(ConfigurationError) -> Self {
    var result = self
    result.fillRate = try values["fill-rate"]?.bytes(0...1 << 40) ?? fillRate
    result.record = try values["record"]?.flag() ?? record
    result.sourceTimeoutMilliseconds =
      try values["source-timeout"]?.milliseconds(Self.sourceTimeouts) ?? sourceTimeoutMilliseconds
    result.onDamage = try values["on-damage"]?.word() ?? onDamage
    return result
  }
}
