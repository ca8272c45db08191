// SPDX-License-Identifier: Apache-2.0

internal import DaemonConfiguration
internal import Logging
internal import SystemPackage

/// Hands each message to the thread that writes it, as a line.
struct LineLogHandler: LogHandler {
  var metadata: Logger.Metadata = [:]
  var logLevel: Logger.Level
  let writer: LogWriter

  subscript(metadataKey key: String) -> Logger.Metadata.Value? {
    get { metadata[key] }
    set { metadata[key] = newValue }
  }

  func log(event: LogEvent) {
    let all = event.metadata.map { metadata.merging($0) { $1 } } ?? metadata
    let source: LogLimiter.Source =
      if event.source == Logger.lifeCycle {
        .lifeCycle
      } else if let session = all["session"] {
        .session("\(session)")
      } else if let user = all["uid"] {
        .user("\(user)")
      } else {
        .service
      }
    guard writer.admits(source) else { return }
    writer.append(writer.text.line(event.level, "\(event.message)", all))
  }
}

extension Logger {
  /// The `source` of a line about the begin or the end of a session: no flood of the session's hides
  /// it.
  static var lifeCycle: String { "life-cycle" }

  /// As a configuration says.
  init(_ configuration: DaemonConfiguration, _ writer: LogWriter) {
    let level: Logger.Level =
      switch configuration.logLevel {
      case .trace: .trace
      case .debug: .debug
      case .info: .info
      case .warning: .warning
      case .error: .error
      }
    self.init(label: "faultline") { _ in LineLogHandler(logLevel: level, writer: writer) }
  }
}
