// SPDX-License-Identifier: Apache-2.0

import ArgumentParser
import FaultlineDaemon
import Foundation
import LinuxSystem
import SystemPackage

/// Speaks docs/control.md: one request, one answer, over the daemon's Unix socket.
struct ControlClient {
  let path: String

  /// An answer of the daemon.
  struct Answer {
    let status: Int
    let body: Data
  }

  /// Sends a request and reads the answer to its end. Throws the daemon's words where it says
  /// no.
  func request(_ method: String, _ target: String) throws -> Answer {
    let socket: UnixSocket
    do throws(Errno) {
      socket = try UnixSocket(connectingTo: FilePath(path))
    } catch {
      let advice =
        error == .permissionDenied
        ? "Only the daemon's user and root may use it."
        : "Is `faultline serve` running, with that --control-socket?"
      throw CommandFailure("\(path): \(error). \(advice)")
    }
    let head = "\(method) \(target) HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    try socket.send(Array(head.utf8))
    var bytes: [UInt8] = []
    while true {
      let piece = try socket.receive(limit: 1 << 16, descriptorLimit: 1).bytes
      guard !piece.isEmpty else { break }
      bytes += piece
      guard bytes.count <= 64 << 20 else { throw CommandFailure("\(path): it says too much") }
      if let answer = try Self.parse(bytes) { return try checked(answer) }
    }
    guard let answer = try Self.parse(bytes) else {
      throw CommandFailure("\(path): the answer is not one of a Faultline daemon")
    }
    return try checked(answer)
  }

  /// The answer, once all of it is there.
  private static func parse(_ bytes: [UInt8]) throws -> Answer? {
    let text = Data(bytes)
    guard let end = text.firstRange(of: Data("\r\n\r\n".utf8)) else { return nil }
    let lines = String(decoding: text[..<end.lowerBound], as: UTF8.self).components(
      separatedBy: "\r\n")
    let words = lines[0].split(separator: " ")
    guard words.count >= 2, words[0].hasPrefix("HTTP/1."), let status = Int(words[1]) else {
      throw CommandFailure("the answer is not HTTP")
    }
    let length = lines.dropFirst().lazy.compactMap { line -> Int? in
      let parts = line.split(separator: ":", maxSplits: 1)
      guard parts.count == 2, parts[0].lowercased() == "content-length" else { return nil }
      return Int(parts[1].trimmingCharacters(in: .whitespaces))
    }.first
    let body = text[end.upperBound...]
    guard let length, body.count >= length else { return nil }
    return Answer(status: status, body: Data(body.prefix(length)))
  }

  private func checked(_ answer: Answer) throws -> Answer {
    guard answer.status < 300 else {
      let words = try? JSONDecoder().decode(ControlMessage.Failure.self, from: answer.body)
      throw CommandFailure(words?.error ?? "the daemon says \(answer.status)")
    }
    return answer
  }

  /// Decodes an answer.
  static func decode<Value: Decodable>(_ answer: Answer) throws -> Value {
    let decoder = JSONDecoder()
    decoder.keyDecodingStrategy = .convertFromSnakeCase
    return try decoder.decode(Value.self, from: answer.body)
  }
}

/// Which daemon a command talks to.
struct ControlOptions: ParsableArguments {
  @Option(
    help: ArgumentHelp(
      "The daemon's control socket; else $FAULTLINE_CONTROL_SOCKET, else that of the service.",
      valueName: "path"),
    completion: .file())
  var controlSocket: String?
  @Flag(help: "Print the daemon's JSON.")
  var json = false

  var client: ControlClient {
    let environment = ProcessInfo.processInfo.environment["FAULTLINE_CONTROL_SOCKET"]
    return ControlClient(path: controlSocket ?? environment ?? "/run/faultline/control.sock")
  }

  /// The daemon's JSON, on one line.
  func printJSON(_ answer: ControlClient.Answer) {
    print(String(decoding: answer.body, as: UTF8.self).trimmingCharacters(in: .newlines))
  }
}
