// SPDX-License-Identifier: Apache-2.0

/// What the daemon is told by its configuration file (docs/configuration.md).
///
/// Values were checked each by itself and against each other; whether files and images are
/// there is for the daemon to find out.
public struct DaemonConfiguration: Sendable, Hashable {
  /// Sockets for VMMs, in the order of the file; their paths differ.
  public var listen: [ListenConfiguration]
  /// The socket for operators; `nil` for none.
  public var controlSocket: String?
  /// Where metrics are offered by HTTP; `nil`: nowhere.
  public var metricsAddress: NetworkAddress?
  /// Threads that serve the faults of all sessions, 1 to 64.
  public var faultThreads = 2
  /// Sessions at a time, 1 to 65536; another VMM is refused.
  public var maximumSessions = 4096
  /// Bytes of clean pages that are kept for clones, of all images together; `nil`: no limit, and
  /// none are kept longer than clones have them.
  public var cacheLimit: Int?
  /// How long a stop waits for sessions to be filled, in milliseconds.
  public var drainTimeoutMilliseconds = 60_000
  /// Which messages are logged.
  public var logLevel: LogLevel
  /// How a message looks.
  public var logFormat: LogFormat

  /// A configuration; what is not given is off, and as in docs/configuration.md.
  public init(
    listen: [ListenConfiguration], controlSocket: String? = nil,
    metricsAddress: NetworkAddress? = nil, logLevel: LogLevel = .info,
    logFormat: LogFormat = .text
  ) {
    self.listen = listen
    self.controlSocket = controlSocket
    self.metricsAddress = metricsAddress
    self.logLevel = logLevel
    self.logFormat = logFormat
  }
}

/// A socket on which VMMs hand over their memory.
public struct ListenConfiguration: Sendable, Hashable {
  /// The socket's path; absolute, at most 107 bytes.
  public var socket: String
  /// What VMMs speak there.
  public var handover: HandoverKind
  /// Which image they get.
  public var image: ImageTemplate
  /// The permissions of the socket's file, 0 to 0o777.
  public var mode: UInt16
  /// Users who may hand over; `nil`: everybody who may connect.
  public var allowedUsers: Set<UInt32>?
  /// How its sessions are served.
  public var sessions: SessionConfiguration

  /// A socket; only its own user may connect unless `mode` says more.
  public init(
    socket: String, handover: HandoverKind = .firecracker, image: ImageTemplate,
    mode: UInt16 = 0o600, allowedUsers: Set<UInt32>? = nil,
    sessions: SessionConfiguration = SessionConfiguration()
  ) {
    self.socket = socket
    self.handover = handover
    self.image = image
    self.mode = mode
    self.allowedUsers = allowedUsers
    self.sessions = sessions
  }
}

/// How sessions are served.
public struct SessionConfiguration: Sendable, Hashable {
  /// Bytes per second and session that are filled in the background; 0 for none.
  public var fillRate = 0
  /// Whether to record which pages are touched first.
  public var record = false
  /// How long a read of the source may take, in milliseconds.
  public var sourceTimeoutMilliseconds = 30_000
  /// What to do about a page that has no right content.
  public var onDamage = DamageResponse.poison

  /// The defaults.
  public init() {}
}

/// What VMMs speak on a socket.
public enum HandoverKind: String, Sendable, CaseIterable {
  /// Firecracker's own (docs/firecracker.md).
  case firecracker
  /// docs/handover.md.
  case faultline
}

/// What to do about a page that has no right content.
public enum DamageResponse: String, Sendable, CaseIterable {
  /// The page stays absent, and who touches it waits: an operator decides.
  case wait
  /// The VMM is ended.
  case stopVMM = "stop-vmm"
  /// A touch of the page is a memory error.
  case poison
}

/// Which messages are logged: these, and those that are worse.
public enum LogLevel: String, Sendable, CaseIterable {
  /// Everything, faults too.
  case trace
  /// What a developer wants to know.
  case debug
  /// Sessions that come and go.
  case info
  /// What may become a failure.
  case warning
  /// Failures.
  case error
}

/// How a message of the log looks.
public enum LogFormat: String, Sendable, CaseIterable {
  /// A line for people.
  case text
  /// A JSON object on a line.
  case json
}

/// A host and a port, such as 127.0.0.1:9090 or [::1]:9090.
public struct NetworkAddress: Sendable, Hashable, CustomStringConvertible {
  /// A name or an address, without brackets.
  public var host: String
  /// 0 to 65535; 0 lets the kernel choose one.
  public var port: UInt16

  /// An address.
  public init(host: String, port: UInt16) {
    self.host = host
    self.port = port
  }

  /// Reads HOST:PORT; an IPv6 address has brackets.
  public init?(_ text: String) {
    guard let colon = text.lastIndex(of: ":"), let port = UInt16(text[text.index(after: colon)...])
    else { return nil }
    var host = text[..<colon]
    if host.hasPrefix("[") {
      guard host.hasSuffix("]") else { return nil }
      host = host.dropFirst().dropLast()
    } else if host.contains(":") {
      return nil
    }
    guard !host.isEmpty, host.allSatisfy({ !$0.isWhitespace && $0 != "[" && $0 != "]" }) else {
      return nil
    }
    self.init(host: String(host), port: port)
  }

  /// HOST:PORT.
  public var description: String { host.contains(":") ? "[\(host)]:\(port)" : "\(host):\(port)" }
}
