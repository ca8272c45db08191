// SPDX-License-Identifier: Apache-2.0

/// What a service sends (docs/handover.md).
public enum ServiceMessage: Sendable, Hashable {
  /// The VMM is served; the service's name for the session.
  case ok(session: String)
  /// The clean pages of an image, for a clone.
  case image(ImageMessage)
  /// The VMM is refused.
  case error(code: String, message: String, versions: [Int]? = nil)
  /// Something happened to a session.
  case status(HandoverStatus)

  /// The whole frame.
  public func frame() throws(ProtocolError) -> [UInt8] {
    var wire = Wire(type: "")
    switch self {
    case .ok(let session):
      wire.type = "ok"
      wire.session = session
    case .image(let image):
      wire.type = "image"
      wire.pageSize = image.pageSize
      wire.regions = image.regions
    case .error(let code, let message, let versions):
      wire.type = "error"
      wire.code = code
      wire.message = message
      wire.versions = versions
    case .status(let status):
      wire.type = "status"
      wire.event = status.event
      wire.hostAddress = status.hostAddress
      wire.length = status.length
      wire.message = status.message
      wire.dropped = status.dropped
    }
    return try JSONMessage.frame(wire)
  }

  /// Decodes a frame's JSON.
  public init(decoding payload: [UInt8]) throws(ProtocolError) {
    let wire: Wire = try JSONMessage.decode(payload)
    switch wire.type {
    case "ok":
      guard let session = wire.session else {
        throw ProtocolError(.badMessage, "it has no \"session\"")
      }
      self = .ok(session: session)
    case "image":
      guard let pageSize = wire.pageSize, let regions = wire.regions else {
        throw ProtocolError(.badMessage, "it has no \"page_size\" or no \"regions\"")
      }
      self = .image(ImageMessage(pageSize: pageSize, regions: regions))
    case "error":
      guard let code = wire.code else { throw ProtocolError(.badMessage, "it has no \"code\"") }
      self = .error(code: code, message: wire.message ?? "", versions: wire.versions)
    case "status":
      guard let event = wire.event else { throw ProtocolError(.badMessage, "it has no \"event\"") }
      self = .status(
        HandoverStatus(
          event: event, hostAddress: wire.hostAddress, length: wire.length,
          message: wire.message ?? "", dropped: wire.dropped ?? 0))
    default:
      throw ProtocolError(.badMessage, "its type \"\(wire.type)\" is not known")
    }
  }

  private struct Wire: Codable {
    var type: String
    var session: String?
    var code: String?
    var message: String?
    var versions: [Int]?
    var event: String?
    var hostAddress: UInt64?
    var length: UInt64?
    var dropped: Int?
    var pageSize: UInt64?
    var regions: [ImageMessage.Region]?

    enum CodingKeys: String, CodingKey {
      case type, session, code, message, versions, event, length, dropped, regions
      case hostAddress = "host_address"
      case pageSize = "page_size"
    }
  }
}

/// Something that happened to a session.
public struct HandoverStatus: Sendable, Hashable {
  /// What happened: `poisoned`, `filled`, `detached`, `ended`, or something newer.
  public var event: String
  /// Where, in the VMM's process; for `poisoned`.
  public var hostAddress: UInt64?
  /// How many bytes from there on.
  public var length: UInt64?
  /// The reason, in words.
  public var message: String
  /// How many messages were lost before this one, because the VMM did not read.
  public var dropped: Int

  /// A status.
  public init(
    event: String, hostAddress: UInt64? = nil, length: UInt64? = nil, message: String = "",
    dropped: Int = 0
  ) {
    self.event = event
    self.hostAddress = hostAddress
    self.length = length
    self.message = message
    self.dropped = dropped
  }

  /// There is no right content for a range; a touch is a memory error.
  public static func poisoned(hostAddress: UInt64, length: UInt64, message: String) -> Self {
    Self(event: "poisoned", hostAddress: hostAddress, length: length, message: message)
  }

  /// The background filling is done.
  public static let filled = Self(event: "filled")

  /// All memory is there, and the VMM goes on without the service.
  public static func detached(_ message: String) -> Self {
    Self(event: "detached", message: message)
  }

  /// The session serves no more.
  public static func ended(_ message: String) -> Self { Self(event: "ended", message: message) }
}
