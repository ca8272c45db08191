// SPDX-License-Identifier: Apache-2.0

internal import FoundationEssentials

/// JSON in and out, with errors in words about the message.
enum JSONMessage {
  static func decode<Message: Decodable>(_ payload: [UInt8]) throws(ProtocolError) -> Message {
    do {
      return try JSONDecoder().decode(Message.self, from: Data(payload))
    } catch {
      throw ProtocolError(decoding: error)
    }
  }

  static func frame(_ message: some Encodable) throws(ProtocolError) -> [UInt8] {
    let encoder = JSONEncoder()
    encoder.outputFormatting = [.sortedKeys, .withoutEscapingSlashes]
    guard let payload = try? encoder.encode(message) else {
      throw ProtocolError(.badMessage, "it cannot be written as JSON")
    }
    guard payload.count <= HandoverFrame.payloadLimit else {
      throw ProtocolError(
        .tooLong,
        "it has \(payload.count) bytes of JSON, and \(HandoverFrame.payloadLimit) are taken")
    }
    let length = UInt32(payload.count)
    return HandoverFrame.magic + (0..<4).map { UInt8(truncatingIfNeeded: length >> ($0 * 8)) }
      + Array(payload)
  }
}

extension ProtocolError {
  /// What a JSON decoder says, in words about the message. `region` is the first number of
  /// the path: hand-overs have lists of regions, and no others with objects.
  public init(decoding error: any Error) {
    guard let error = error as? DecodingError else {
      self.init(.badMessage, "its JSON cannot be read")
      return
    }
    func name(_ context: DecodingError.Context) -> String {
      context.codingPath.last { $0.intValue == nil }.map { "\"\($0.stringValue)\"" } ?? "it"
    }
    let path: [any CodingKey]
    let reason: String
    switch error {
    case .keyNotFound(let key, let context):
      (path, reason) = (context.codingPath, "it has no \"\(key.stringValue)\"")
    case .typeMismatch(_, let context), .valueNotFound(_, let context):
      (path, reason) = (context.codingPath, "\(name(context)) is not of the right type")
    case .dataCorrupted(let context) where !context.codingPath.isEmpty:
      (path, reason) = (context.codingPath, "\(name(context)) has a value that is not known")
    case .dataCorrupted:
      // Foundation says "not valid JSON" of numbers that do not fit, too.
      path = []
      reason = "it is not JSON, or has a number that is negative, a fraction or too large"
    @unknown default:
      (path, reason) = ([], "its JSON cannot be read")
    }
    self.init(.badMessage, reason, region: path.lazy.compactMap(\.intValue).first)
  }
}
