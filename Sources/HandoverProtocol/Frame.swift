// SPDX-License-Identifier: Apache-2.0

/// The frames of docs/handover.md: magic, length, JSON.
public enum HandoverFrame {
  /// The version of the protocol.
  public static let version = 1
  /// "FLHO".
  public static let magic: [UInt8] = [0x46, 0x4c, 0x48, 0x4f]
  /// Bytes before the JSON.
  public static let headerLength = 8
  /// Bytes of JSON in a frame.
  public static let payloadLimit = 262_144
  /// Descriptors with a message.
  public static let descriptorLimit = 16
}

/// Puts frames together from the pieces of a stream.
public struct FrameAssembler: Sendable {
  private var bytes: [UInt8] = []
  private let payloadLimit: Int

  /// An assembler that refuses more than some bytes of JSON in a frame.
  public init(payloadLimit: Int = HandoverFrame.payloadLimit) {
    self.payloadLimit = min(max(1, payloadLimit), HandoverFrame.payloadLimit)
  }

  /// Bytes that are not part of a frame that was taken.
  public var pendingBytes: Int { bytes.count }

  /// Adds what was received.
  public mutating func append(_ piece: [UInt8]) { bytes += piece }

  /// The JSON of the next frame; `nil` when it is not complete.
  ///
  /// Throws `.badFrame` at the first byte that is no frame's, and `.tooLong` as soon as the
  /// length is known: a caller never keeps more than a frame and a piece.
  public mutating func next() throws(ProtocolError) -> [UInt8]? {
    for (byte, expected) in zip(bytes, HandoverFrame.magic) where byte != expected {
      throw ProtocolError(.badFrame, "it does not begin with \"FLHO\"")
    }
    guard bytes.count >= HandoverFrame.headerLength else { return nil }
    let length = bytes[4..<8].reversed().reduce(0) { $0 << 8 | Int($1) }
    guard length > 0 else { throw ProtocolError(.badFrame, "a frame is empty") }
    guard length <= payloadLimit else {
      throw ProtocolError(
        .tooLong, "a frame has \(length) bytes of JSON, and \(payloadLimit) are taken")
    }
    let end = HandoverFrame.headerLength + length
    guard bytes.count >= end else { return nil }
    defer { bytes.removeFirst(end) }
    return Array(bytes[HandoverFrame.headerLength..<end])
  }
}

/// Why bytes are not what docs/handover.md says.
public struct ProtocolError: Error, Sendable, CustomStringConvertible {
  /// The kind of failure. A struct, so that kinds can be added.
  public struct Code: Hashable, Sendable {
    private enum Kind { case badFrame, tooLong, badMessage, unsupportedVersion }
    private let kind: Kind
    private init(_ kind: Kind) { self.kind = kind }

    /// Bytes that are no frame.
    public static let badFrame = Self(.badFrame)
    /// A frame that is longer than allowed.
    public static let tooLong = Self(.tooLong)
    /// JSON that is no message of this protocol.
    public static let badMessage = Self(.badMessage)
    /// A version that this build does not speak.
    public static let unsupportedVersion = Self(.unsupportedVersion)
  }

  /// The kind of failure.
  public let code: Code
  /// What is wrong, in words.
  public let description: String
  /// The region's place in the message, if it is about one.
  public let region: Int?

  init(_ code: Code, _ description: String, region: Int? = nil) {
    self.code = code
    self.description = description
    self.region = region
  }
}
