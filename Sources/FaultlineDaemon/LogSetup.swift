// SPDX-License-Identifier: Apache-2.0

internal import DaemonConfiguration
internal import Foundation
internal import Logging

/// Writes each message as a line to standard error: for people, or as a JSON object.
struct LineLogHandler: LogHandler {
  var metadata: Logger.Metadata = [:]
  var logLevel: Logger.Level
  let format: LogFormat
  /// systemd notes the time by itself.
  let hasTime: Bool

  subscript(metadataKey key: String) -> Logger.Metadata.Value? {
    get { metadata[key] }
    set { metadata[key] = newValue }
  }

  func log(event: LogEvent) {
    let all = metadata.merging(event.metadata ?? [:]) { $1 }
    var line: String
    switch format {
    case .text:
      line = hasTime ? Self.time() + " " : ""
      line += "\(event.level.rawValue): \(event.message)"
      for (key, value) in all.sorted(by: { $0.key < $1.key }) { line += " \(key)=\(value)" }
    case .json:
      var object = all.mapValues { "\($0)" }
      object["time"] = Self.time()
      object["level"] = event.level.rawValue
      object["message"] = "\(event.message)"
      let encoder = JSONEncoder()
      encoder.outputFormatting = [.sortedKeys, .withoutEscapingSlashes]
      line = (try? encoder.encode(object)).map { String(decoding: $0, as: UTF8.self) } ?? ""
    }
    // A VMM's name may have anything but control characters; one line stays one.
    line = line.replacing("\n", with: " ") + "\n"
    FileHandle.standardError.write(Data(line.utf8))
  }

  private static func time() -> String {
    Date().formatted(.iso8601.time(includingFractionalSeconds: true))
  }
}

/// swift-log's, for files in which another module's `Logging` is in the way.
typealias DaemonLogger = Logger

extension Logger {
  /// As a configuration says.
  init(_ configuration: DaemonConfiguration, environment: [String: String]) {
    let level: Logger.Level =
      switch configuration.logLevel {
      case .trace: .trace
      case .debug: .debug
      case .info: .info
      case .warning: .warning
      case .error: .error
      }
    self.init(label: "faultline") { _ in
      LineLogHandler(
        logLevel: level, format: configuration.logFormat,
        hasTime: environment["JOURNAL_STREAM"] == nil)
    }
  }
}
