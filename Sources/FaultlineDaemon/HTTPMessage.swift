// SPDX-License-Identifier: Apache-2.0

internal import Foundation

/// A request of HTTP/1.1 (RFC 9112), all of it.
struct HTTPRequest: Sendable {
  var method: String
  /// Without its query.
  var path: String
  var body: Data
}

/// What is answered to one request.
struct HTTPAnswer: Sendable {
  var status = 200
  var contentType = "application/json"
  var body: Data

  /// `{"error": "in words"}`.
  static func failure(_ status: Int, _ words: String) -> Self {
    let object = ControlMessage.Failure(error: words)
    return Self(status: status, body: (try? JSONEncoder().encode(object)) ?? Data())
  }

  /// As it is sent; the connection closes after it.
  func bytes(forHead isHead: Bool) -> [UInt8] {
    let text =
      "HTTP/1.1 \(status) \(Self.reasons[status] ?? "Other")\r\nContent-Type: \(contentType)\r\n"
      + "Content-Length: \(body.count)\r\nConnection: close\r\n\r\n"
    return Array(text.utf8) + (isHead ? [] : Array(body))
  }

  private static let reasons = [
    200: "OK", 202: "Accepted", 400: "Bad Request", 404: "Not Found", 405: "Method Not Allowed",
    408: "Request Timeout", 409: "Conflict", 411: "Length Required", 413: "Content Too Large",
    431: "Request Header Fields Too Large", 500: "Internal Server Error",
    503: "Service Unavailable",
  ]
}

/// Puts a request together from the pieces of a stream. All of it is bounded.
struct HTTPAssembler: Sendable {
  /// Bytes before the body.
  static let headLimit = 8192
  static let bodyLimit = 65_536

  enum Progress: Sendable {
    case incomplete
    /// The client waits for "100 Continue" before it sends the body.
    case expectsContinue
    case request(HTTPRequest)
    case refused(HTTPAnswer)
  }

  private var bytes: [UInt8] = []
  /// Bytes in which the head's end was looked for.
  private var searched = 0
  private var head: (request: HTTPRequest, bodyStart: Int, length: Int)?

  /// Goes on with what was received.
  mutating func add(_ piece: [UInt8]) -> Progress {
    bytes += piece
    var expects = false
    if head == nil {
      guard let end = headEnd() else {
        return bytes.count <= Self.headLimit
          ? .incomplete
          : .refused(.failure(431, "a request has at most \(Self.headLimit) bytes before its body"))
      }
      switch Self.parse(bytes[..<end]) {
      case .failure(let answer): return .refused(answer.answer)
      case .success(let parsed):
        head = (parsed.request, end, parsed.length)
        expects = parsed.expectsContinue && bytes.count < end + parsed.length
      }
    }
    guard let head, bytes.count >= head.bodyStart + head.length else {
      return expects ? .expectsContinue : .incomplete
    }
    var request = head.request
    request.body = Data(bytes[head.bodyStart..<head.bodyStart + head.length])
    return .request(request)
  }

  /// After the empty line.
  private mutating func headEnd() -> Int? {
    let mark = Array("\r\n\r\n".utf8)
    while searched + mark.count <= min(bytes.count, Self.headLimit) {
      if bytes[searched] == mark[0], bytes[searched...].starts(with: mark) {
        return searched + mark.count
      }
      searched += 1
    }
    return nil
  }

  private struct Refusal: Error { let answer: HTTPAnswer }
  private struct Head {
    var request: HTTPRequest
    var length = 0
    var expectsContinue = false
  }

  private static func parse(_ bytes: ArraySlice<UInt8>) -> Result<Head, Refusal> {
    func refused(_ status: Int, _ words: String) -> Result<Head, Refusal> {
      .failure(Refusal(answer: .failure(status, words)))
    }
    let lines = String(decoding: bytes, as: UTF8.self).components(separatedBy: "\r\n")
    let words = lines[0].split(separator: " ", omittingEmptySubsequences: false)
    guard words.count == 3, !words[0].isEmpty, words[1].hasPrefix("/"),
      words[2].hasPrefix("HTTP/1.")
    else { return refused(400, "it is not HTTP/1.1") }
    var head = Head(
      request: HTTPRequest(
        method: String(words[0]), path: String(words[1].prefix { $0 != "?" }), body: Data()))
    var lengths: Set<String> = []
    for line in lines.dropFirst() where !line.isEmpty {
      guard let colon = line.firstIndex(of: ":") else {
        return refused(400, "a header has no colon")
      }
      let value = line[line.index(after: colon)...].trimmingCharacters(in: .whitespaces)
      switch line[..<colon].lowercased() {
      case "content-length": lengths.insert(value)
      case "transfer-encoding":
        return refused(411, "a body needs Content-Length, and has at most \(bodyLimit) bytes")
      case "expect": head.expectsContinue = value.lowercased() == "100-continue"
      default: break
      }
    }
    if let text = lengths.first {
      guard lengths.count == 1, !text.isEmpty, text.utf8.allSatisfy({ (0x30...0x39).contains($0) })
      else { return refused(400, "Content-Length is no number") }
      guard let length = Int(text), length <= bodyLimit else {
        return refused(413, "a body has at most \(bodyLimit) bytes")
      }
      head.length = length
    }
    return .success(head)
  }
}
