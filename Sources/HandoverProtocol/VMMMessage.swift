// SPDX-License-Identifier: Apache-2.0

/// What a VMM sends (docs/handover.md): `open` if it is a clone, and `attach`.
public enum VMMMessage: Sendable, Hashable {
  /// It wants the clean pages of an image.
  case open(OpenMessage)
  /// It hands over its memory.
  case attach(AttachMessage)

  /// Decodes a frame's JSON; the version is looked at first, so that a later one is
  /// refused as such, whatever else it has.
  public init(decoding payload: [UInt8]) throws(ProtocolError) {
    let head: Head = try JSONMessage.decode(payload)
    guard head.type == "attach" || head.type == "open" else {
      throw ProtocolError(
        .badMessage, "its type is \"\(head.type)\", and \"attach\" or \"open\" is expected")
    }
    guard head.version == HandoverFrame.version else {
      throw ProtocolError(
        .unsupportedVersion,
        "version \(head.version) is not spoken here, only \(HandoverFrame.version)")
    }
    self =
      head.type == "open"
      ? .open(try JSONMessage.decode(payload)) : .attach(try JSONMessage.decode(payload))
  }

  private struct Head: Decodable {
    var type: String
    var version: Int
  }
}

/// Asks for the clean pages of an image (docs/handover.md, "open and image").
public struct OpenMessage: Sendable, Hashable, Codable {
  private var type = "open"
  /// The version of the protocol.
  public private(set) var version = HandoverFrame.version
  /// The VMM's name, for logs.
  public var name: String?
  /// Which image.
  public var image: String?
  /// Bytes of a page, 4096 or 2097152; 4096 if not given.
  public var pageSize: UInt64?

  /// A request.
  public init(name: String? = nil, image: String? = nil, pageSize: UInt64? = nil) {
    self.name = name
    self.image = image
    self.pageSize = pageSize
  }

  /// The whole frame.
  public func frame() throws(ProtocolError) -> [UInt8] { try JSONMessage.frame(self) }

  private enum CodingKeys: String, CodingKey {
    case type, version, name, image
    case pageSize = "page_size"
  }
}

/// What a service answers to `open`; with it comes a descriptor for each region.
public struct ImageMessage: Sendable, Hashable, Codable {
  /// A region of the image.
  public struct Region: Sendable, Hashable, Codable {
    /// Where the guest had it.
    public var guestAddress: UInt64
    /// Where it begins among the image's regions, one after the other.
    public var offset: UInt64
    /// Bytes.
    public var length: UInt64
    /// What the machine called it.
    public var name: String?
    /// Which of the descriptors of the message.
    public var memory: Int

    /// A region.
    public init(
      guestAddress: UInt64, offset: UInt64, length: UInt64, name: String? = nil, memory: Int
    ) {
      self.guestAddress = guestAddress
      self.offset = offset
      self.length = length
      self.name = name
      self.memory = memory
    }

    private enum CodingKeys: String, CodingKey {
      case guestAddress = "guest_address"
      case offset, length, name, memory
    }
  }

  /// Bytes of a page.
  public var pageSize: UInt64
  /// All of the image, in its order.
  public var regions: [Region]

  /// An answer.
  public init(pageSize: UInt64, regions: [Region]) {
    self.pageSize = pageSize
    self.regions = regions
  }
}
