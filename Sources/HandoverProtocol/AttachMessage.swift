// SPDX-License-Identifier: Apache-2.0

/// What a VMM sends: its memory and what is to be in it (docs/handover.md, "attach").
///
/// Fields are as they came; the service checks what they mean.
public struct AttachMessage: Sendable, Hashable, Codable {
  /// What a descriptor of the message is.
  public enum Descriptor: String, Sendable, Codable {
    /// The userfaultfd; the first one.
    case userfaultfd
    /// A memory file that regions map.
    case memory
  }

  /// How absent pages of a region are filled.
  public enum Mode: String, Sendable, Codable {
    /// By UFFDIO_COPY; registered MISSING.
    case missing
    /// Through the memory file, then UFFDIO_CONTINUE; registered MISSING|MINOR.
    case minor
    /// From the clean pages of all clones, by UFFDIO_CONTINUE; registered MISSING|MINOR.
    case clone
  }

  /// A range of the VMM's memory.
  public struct Region: Sendable, Hashable, Codable {
    /// Where it is in the VMM's process.
    public var hostAddress: UInt64
    /// Bytes.
    public var length: UInt64
    /// Bytes; 4096 if not given.
    public var pageSize: UInt64?
    /// Its content is the image's at these guest-physical addresses; or `offset`.
    public var guestAddress: UInt64?
    /// Its content begins at this byte of the image's regions, one after the other.
    public var offset: UInt64?
    /// How it is filled; `.missing` if not given.
    public var mode: Mode?
    /// The memory file that it maps, counted from 0; of a clone the region of `ImageMessage`.
    public var memory: Int?
    /// Bytes into the memory file; 0 if not given.
    public var memoryOffset: UInt64?

    /// A region; give it a guest address or an offset.
    public init(
      hostAddress: UInt64, length: UInt64, pageSize: UInt64? = nil, guestAddress: UInt64? = nil,
      offset: UInt64? = nil, mode: Mode? = nil, memory: Int? = nil, memoryOffset: UInt64? = nil
    ) {
      self.hostAddress = hostAddress
      self.length = length
      self.pageSize = pageSize
      self.guestAddress = guestAddress
      self.offset = offset
      self.mode = mode
      self.memory = memory
      self.memoryOffset = memoryOffset
    }

    private enum CodingKeys: String, CodingKey {
      case hostAddress = "host_address"
      case length
      case pageSize = "page_size"
      case guestAddress = "guest_address"
      case offset, mode, memory
      case memoryOffset = "memory_offset"
    }
  }

  /// What the VMM wants besides being served.
  public struct Options: Sendable, Hashable, Codable {
    /// Whether to record which pages are touched first; `nil`: as configured.
    public var record: Bool?
    /// Bytes per second to fill in the background, 0 for none; `nil`: as configured.
    public var fillRate: UInt64?

    /// Options; what is not given is as the service is configured.
    public init(record: Bool? = nil, fillRate: UInt64? = nil) {
      self.record = record
      self.fillRate = fillRate
    }

    private enum CodingKeys: String, CodingKey {
      case record
      case fillRate = "fill_rate"
    }
  }

  private var type = "attach"
  /// The version of the protocol.
  public private(set) var version = HandoverFrame.version
  /// The VMM's name, for logs.
  public var name: String?
  /// Which image.
  public var image: String?
  /// What the descriptors of the message are, in their order.
  public var descriptors: [Descriptor]
  /// The memory.
  public var regions: [Region]
  /// What else is wanted.
  public var options: Options?

  /// A message about some regions.
  ///
  /// - Parameter memoryFiles: how many memory files follow the userfaultfd.
  public init(
    regions: [Region], name: String? = nil, image: String? = nil, memoryFiles: Int = 0,
    options: Options? = nil
  ) {
    self.name = name
    self.image = image
    self.regions = regions
    self.options = options
    descriptors = [.userfaultfd] + Array(repeating: .memory, count: memoryFiles)
  }

  /// Decodes a frame's JSON; the version is looked at first, so that a later one is
  /// refused as such, whatever else it has.
  public init(decoding payload: [UInt8]) throws(ProtocolError) {
    guard case .attach(let message) = try VMMMessage(decoding: payload) else {
      throw ProtocolError(.badMessage, "its type is \"open\", and \"attach\" is expected")
    }
    self = message
  }

  /// The whole frame.
  public func frame() throws(ProtocolError) -> [UInt8] { try JSONMessage.frame(self) }
}
