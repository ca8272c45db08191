// SPDX-License-Identifier: Apache-2.0

import Foundation
import SystemPackage
import TestSupport
import Testing

@testable import DaemonConfiguration

private let minimal = """
  listen:
    - socket: /run/a.sock
      image: /images/a.img

  """

/// A text that is refused, at a place.
private struct BadText: Sendable, CustomStringConvertible {
  let description: String
  let text: String
  let place: String
  let code: ConfigurationError.Code
  let says: String
  init(
    _ name: String, _ text: String, _ place: String, _ code: ConfigurationError.Code, _ says: String
  ) {
    (description, self.text, self.place, self.code, self.says) = (name, text, place, code, says)
  }

  /// A line after the minimal file, which has three.
  init(more line: String, _ column: Int, _ code: ConfigurationError.Code, _ says: String) {
    self.init(line, minimal + line, "4:\(column)", code, says)
  }

  /// A line in the first socket.
  init(socket line: String, _ column: Int, _ code: ConfigurationError.Code, _ says: String) {
    self.init(line, minimal + "    " + line, "4:\(column + 4)", code, says)
  }
}

private let badTexts: [BadText] = [
  BadText("empty", "", "", .missingKey, "listen"),
  BadText("only a comment", "# hello\n", "", .missingKey, "listen"),
  BadText("a word", "hello", "1:1", .wrongType, "keys and values"),
  BadText("a list", "- listen", "1:1", .wrongType, "keys and values"),
  BadText("no sockets", "record: true", "1:1", .missingKey, "listen"),
  BadText("sockets that are none", "listen: yes", "1:9", .wrongType, "a list"),
  BadText("an empty list", "listen: []", "1:9", .invalidValue, "empty"),
  BadText("a socket that is a path", "listen: [/run/x]", "1:10", .wrongType, "socket"),
  BadText("no image", "listen:\n  - socket: /x", "2:5", .missingKey, "image"),
  BadText("no path", "listen:\n  - image: /x", "2:5", .missingKey, "socket"),
  BadText("an open bracket", "listen: [", "2:1", .syntax, "not YAML"),
  BadText("a tab", "listen:\n\t- socket: /x", "2:1", .syntax, "not YAML"),
  BadText("an undefined alias", "listen: *x", "1:9", .syntax, "alias"),
  BadText("two documents", minimal + "---\n" + minimal, "4:1", .syntax, "document"),
  BadText("a key twice", minimal + "record: true\nrecord: false", "4:1", .syntax, "twice"),
  BadText(
    "a key twice, by tags", minimal + "record: true\n!!binary record: false", "5:1", .syntax,
    "twice"),
  BadText(
    "a socket twice", minimal + "  - {socket: /run/a.sock, image: /b}", "4:5", .invalidValue,
    "twice"),
  BadText(more: "fault_threads: 2", 1, .unknownKey, "did you mean \"fault-threads\"?"),
  BadText(more: "recrod: true", 1, .unknownKey, "did you mean \"record\"?"),
  BadText(more: "LOG-LEVEL: info", 1, .unknownKey, "did you mean \"log-level\"?"),
  BadText(more: "colour: red", 1, .unknownKey, "there are: listen"),
  BadText(more: "[a]: red", 1, .wrongType, "single value"),
  BadText(more: "<<: {record: true}", 1, .unknownKey, "is not a key"),
  BadText(more: "fault-threads: 0", 16, .invalidValue, "1 to 64"),
  BadText(more: "max-sessions: 0", 15, .invalidValue, "1 to 65536"),
  BadText(more: "fault-threads: many", 16, .invalidValue, "\"many\""),
  BadText(more: "fault-threads: [1]", 16, .wrongType, "single value"),
  BadText(more: "fault-threads:", 15, .invalidValue, "\"\""),
  BadText(more: "fill-rate: -1", 12, .invalidValue, "number of bytes"),
  BadText(more: "fill-rate: 10 potatoes", 12, .invalidValue, "64M"),
  BadText(more: "fill-rate: 99999999999999999999G", 12, .invalidValue, "64M"),
  BadText(more: "fill-rate: 9000000T", 12, .invalidValue, "1T"),
  BadText(more: "cache-size: 100K", 13, .invalidValue, "at least 1M and at most 1024T"),
  BadText(more: "cache-size: 0", 13, .invalidValue, "at least 1M"),
  BadText(more: "record: maybe", 9, .invalidValue, "true or false"),
  BadText(more: "source-timeout: 30", 17, .invalidValue, "30s"),
  BadText(more: "source-timeout: 2h", 17, .invalidValue, "3600s"),
  BadText(more: "source-timeout: 1ms", 17, .invalidValue, "100ms"),
  BadText(more: "on-damage: panic", 12, .invalidValue, "wait, stop-vmm or poison"),
  BadText(more: "control-socket: run/x", 17, .invalidValue, "absolute path"),
  BadText(more: "control-socket: /run/a.sock", 17, .invalidValue, "sockets for VMMs"),
  BadText(
    more: "control-socket: /" + String(repeating: "x", count: 107), 17, .invalidValue, "107 bytes"),
  BadText(more: "metrics: 9090", 10, .invalidValue, "HOST:PORT"),
  BadText(more: "metrics: localhost:99999", 10, .invalidValue, "HOST:PORT"),
  BadText(more: "metrics: ::1:9090", 10, .invalidValue, "HOST:PORT"),
  BadText(more: "drain-timeout: 1ms", 16, .invalidValue, "100ms"),
  BadText(more: "log-level: loud", 12, .invalidValue, "trace, debug, info, warning or error"),
  BadText(more: "log-format: xml", 13, .invalidValue, "text or json"),
  BadText(socket: "mode: 0888", 7, .invalidValue, "octal"),
  BadText(socket: "mode: 01000", 7, .invalidValue, "octal"),
  BadText(socket: "mode: +660", 7, .invalidValue, "octal"),
  BadText(socket: "mode: rw", 7, .invalidValue, "octal"),
  BadText(socket: "allow-uid: root", 12, .wrongType, "a list"),
  BadText(socket: "allow-uid: [0, root]", 16, .invalidValue, "0 to 4294967294"),
  BadText(socket: "allow-uid: [4294967295]", 13, .invalidValue, "4294967294"),
  BadText(socket: "handover: qemu", 11, .invalidValue, "firecracker or faultline"),
  BadText(socket: "allow-uids: [0]", 1, .unknownKey, "did you mean \"allow-uid\"?"),
  BadText(socket: "log-level: info", 1, .unknownKey, "an element of listen"),
  BadText(
    "a relative image", "listen:\n  - socket: /x\n    image: a.img", "3:12", .invalidValue,
    "absolute path"),
  BadText(
    "an unknown place", "listen:\n  - socket: /x\n    image: \"/{vm}.img\"", "3:12", .invalidValue,
    "{image}"),
  BadText(
    "a place that Firecracker does not fill", "listen:\n  - socket: /x\n    image: \"/{name}.img\"",
    "3:12", .invalidValue, "Firecracker"),
]

@Suite("The configuration file")
struct ConfigurationTests {
  @Test("The example in docs/configuration.md says what it seems to say")
  func document() throws {
    let path = URL(fileURLWithPath: #filePath).deletingLastPathComponent()
      .appendingPathComponent("../../docs/configuration.md")
    let text = try String(contentsOf: path, encoding: .utf8)
    let example = try #require(
      text.components(separatedBy: "```yaml\n").last?.components(separatedBy: "```").first)
    let configuration = try DaemonConfiguration(yaml: example, file: "example")

    var common = SessionConfiguration()
    common.fillRate = 256 << 20
    common.record = true
    var second = common
    second.onDamage = .stopVMM
    var expected = DaemonConfiguration(
      listen: [
        ListenConfiguration(
          socket: "/run/faultline/firecracker.sock",
          image: try #require(ImageTemplate("/var/lib/faultline/debian-12.img")), mode: 0o660,
          allowedUsers: [0, 1001], sessions: common),
        ListenConfiguration(
          socket: "/run/faultline/handover.sock", handover: .faultline,
          image: try #require(ImageTemplate("/var/lib/faultline/images/{image}.img")),
          sessions: second),
      ],
      controlSocket: "/run/faultline/control.sock",
      metricsAddress: NetworkAddress(host: "127.0.0.1", port: 9090))
    expected.faultThreads = 4
    expected.maximumSessions = 1000
    expected.cacheLimit = 8 << 30
    expected.drainTimeoutMilliseconds = 300_000
    #expect(configuration == expected)

    // What the tables say of defaults.
    let plain = try DaemonConfiguration(yaml: minimal, file: "minimal")
    #expect(plain.listen[0].mode == 0o600 && plain.listen[0].allowedUsers == nil)
    #expect(plain.listen[0].sessions == SessionConfiguration())
    #expect(plain.controlSocket == nil && plain.metricsAddress == nil)
    #expect(plain.maximumSessions == 4096)
    #expect(plain.cacheLimit == nil)
    #expect(plain.faultThreads == 2 && plain.drainTimeoutMilliseconds == 60_000)
    #expect(SessionConfiguration().sourceTimeoutMilliseconds == 30_000)
  }

  @Test("Each key of the tables exists, and no other")
  func documentedKeys() throws {
    let path = URL(fileURLWithPath: #filePath).deletingLastPathComponent()
      .appendingPathComponent("../../docs/configuration.md")
    let text = try String(contentsOf: path, encoding: .utf8)
    let keys = text.split(separator: "\n").filter { $0.hasPrefix("| `") }.compactMap { line in
      line.split(separator: "`").dropFirst().first.map(String.init)
    }.filter { !$0.hasPrefix("{") }
    func message(_ yaml: String) -> String {
      do {
        _ = try DaemonConfiguration(yaml: yaml, file: "")
        return ""
      } catch { return error.description }
    }
    let ofFile = message("zzzzzzzzzz: 1")
    let ofSocket = message("listen:\n  - zzzzzzzzzz: 1")
    let known = Set(
      (ofFile + ", " + ofSocket).split(separator: ": ").flatMap { part in
        part.split(separator: ", ").map { String($0.prefix { $0 != ":" }) }
      })
    #expect(Set(keys).count == 18)
    for key in keys { #expect(known.contains(key), "\(key)") }
  }

  @Test("Errors name the place and what is allowed", arguments: badTexts)
  private func errors(bad: BadText) throws {
    let error = try #require(
      throws: ConfigurationError.self,
      performing: {
        _ = try DaemonConfiguration(yaml: bad.text, file: "f.yaml")
      })
    #expect(error.code == bad.code, "\(error)")
    let place = bad.place.isEmpty ? "f.yaml: " : "f.yaml:\(bad.place): "
    #expect(error.description.hasPrefix(place), "\(error)")
    #expect(error.description.contains(bad.says), "\(error)")
  }

  @Test("A file: read, missing, a directory, too long, not text")
  func files() throws {
    try withTemporaryDirectory { directory in
      let path = directory + "/faultline.yaml"
      func failure() -> ConfigurationError? {
        do throws(ConfigurationError) {
          _ = try DaemonConfiguration(file: FilePath(path))
          return nil
        } catch { return error }
      }
      #expect(failure()?.errno == .noSuchFileOrDirectory)
      try Data(minimal.utf8).write(to: URL(fileURLWithPath: path))
      #expect(failure() == nil)
      try Data(repeating: 0x20, count: DaemonConfiguration.fileLimit + 1)
        .write(to: URL(fileURLWithPath: path))
      #expect(failure()?.description.contains("more than 1048576 bytes") == true)
      try Data([0x6c, 0xff, 0xfe]).write(to: URL(fileURLWithPath: path))
      #expect(failure()?.description.contains("UTF-8") == true)
      try FileManager.default.removeItem(atPath: path)
      try FileManager.default.createDirectory(atPath: path, withIntermediateDirectories: false)
      #expect(failure()?.errno == .isDirectory)
    }
  }

  @Test("Deep nesting, aliases of aliases and cut files are errors and nothing worse")
  func hostile() {
    var texts = [
      String(repeating: "[", count: 20_000), String(repeating: "- ", count: 20_000),
      String(repeating: "{a: ", count: 20_000), "listen: &a [*a]", "a: !!binary \"\u{7}\"",
      "\u{feff}", "\u{0}", "? ? ? a", "listen: |\n", "--- \n...\n---",
    ]
    var bomb = "a0: &a0 [x]\n"
    for level in 1..<30 { bomb += "a\(level): &a\(level) [*a\(level - 1), *a\(level - 1)]\n" }
    texts.append(bomb)
    let bytes = Array(minimal.utf8)
    texts += bytes.indices.map { String(decoding: bytes[..<$0], as: UTF8.self) }
    for text in texts {
      do {
        _ = try DaemonConfiguration(yaml: text, file: "f")
      } catch {
        #expect(error.description.hasPrefix("f"))
      }
    }
  }

  @Test("An image's path has what the VMM is, and never leaves its directory")
  func templates() throws {
    let values = ImageTemplate.Values(image: "deb-12", name: "vm.1", userID: 7, processID: 42)
    let all = try #require(ImageTemplate("/i/{image}/{name}-{uid}-{pid}.img"))
    #expect(all.path(for: values) == "/i/deb-12/vm.1-7-42.img")
    #expect(all.asksTheVMM)
    #expect(try #require(ImageTemplate("/plain")).path(for: values) == "/plain")
    let nobody = ImageTemplate.Values(userID: 0, processID: 1)
    #expect(all.path(for: nobody) == nil)
    #expect(try #require(ImageTemplate("/{uid}")).path(for: nobody) == "/0")
    for name in ["", ".", "..", "a/b", "../../etc", ".hidden", "a b", "ä", "a\u{0}"] {
      let hostile = ImageTemplate.Values(image: name, userID: 0, processID: 1)
      #expect(try #require(ImageTemplate("/i/{image}")).path(for: hostile) == nil)
    }
    for text in ["", "/{", "/}", "/{}", "/{image", "/{ image }", "/{{image}}"] {
      #expect(ImageTemplate(text) == nil)
    }
  }

  @Test("Quantities")
  func quantities() {
    #expect(Quantity.bytes("0") == 0 && Quantity.bytes("4096") == 4096)
    #expect(Quantity.bytes("64K") == 65536 && Quantity.bytes("1kib") == 1024)
    #expect(Quantity.bytes("2MB") == 2 << 20 && Quantity.bytes("3G") == 3 << 30)
    #expect(Quantity.bytes("10b") == 10)
    for text in ["", "G", "-1", "1.5G", "1 G", "1GG", "8589934592G"] {
      #expect(Quantity.bytes(text) == nil)
    }
    #expect(Quantity.milliseconds("500ms") == 500 && Quantity.milliseconds("2h") == 7_200_000)
    for text in ["", "5", "s", "5 s", "5M"] { #expect(Quantity.milliseconds(text) == nil) }
  }
}
