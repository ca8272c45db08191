// SPDX-License-Identifier: Apache-2.0

import ArgumentParser
import FaultlineDaemon
import Foundation

/// The sessions of a daemon.
struct PsCommand: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "ps", abstract: "List the VMs that a daemon serves.")

  @OptionGroup var control: ControlOptions

  func run() throws {
    let answer = try control.client.request("GET", "/v1/sessions")
    if control.json { return control.printJSON(answer) }
    let list: ControlMessage.SessionList = try ControlClient.decode(answer)
    var rows = [
      [
        "ID", "STATE", "PID", "UID", "AGE", "MEMORY", "CLONE", "FILLED", "FAULTS", "BAD", "NAME",
        "IMAGE",
      ]
    ]
    for session in list.sessions {
      rows.append([
        session.id, session.state, "\(session.processID)", "\(session.userID)",
        Self.age(session.started), Terminal.size(session.bytes),
        session.clone ? "yes" : "-", Self.filled(session.fill),
        "\(session.faults)", "\(session.failedPages)", Terminal.plain(session.name ?? "-"),
        Terminal.plain(session.image),
      ])
    }
    let widths = rows[0].indices.map { column in rows.map { $0[column].count }.max() ?? 0 }
    for row in rows {
      let line = zip(row, widths).map { $0.padding(toLength: $1, withPad: " ", startingAt: 0) }
      print(line.joined(separator: "  ").trimmingCharacters(in: .whitespaces))
    }
  }

  static func filled(_ fill: ControlMessage.Fill) -> String {
    switch fill.phase {
    case "idle" where fill.total == 0: "-"
    case "done": "done"
    default: "\(fill.total > 0 ? fill.done * 100 / fill.total : 0) %"
    }
  }

  private static func age(_ started: Int) -> String {
    let seconds = max(0, Int(Date().timeIntervalSince1970) - started)
    return switch seconds {
    case ..<120: "\(seconds)s"
    case ..<7200: "\(seconds / 60)m"
    case ..<172_800: "\(seconds / 3600)h"
    default: "\(seconds / 86_400)d"
    }
  }
}

/// One session.
struct StatsCommand: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "stats", abstract: "Show what a session of a daemon has done.")

  @Argument(help: "The session, as `faultline ps` names it.")
  var session: String
  @OptionGroup var control: ControlOptions

  func run() throws {
    let answer = try control.client.request("GET", "/v1/sessions/\(try identifier(session))")
    if control.json { return control.printJSON(answer) }
    let found: ControlMessage.Session = try ControlClient.decode(answer)
    print("session \(found.id)  \(found.state)  \(Terminal.plain(found.name ?? ""))")
    print("  process         \(found.processID) of user \(found.userID)")
    print("  image           \(Terminal.plain(found.image))")
    print("  memory          \(Terminal.size(found.bytes))\(found.clone ? ", a clone" : "")")
    print(
      "  background      \(found.fill.phase) \(Terminal.size(found.fill.done)) of "
        + Terminal.size(found.fill.total))
    print("  pending reads   \(found.pendingReads)")
    for (name, value) in (found.statistics ?? [:]).sorted(by: { $0.key < $1.key }) {
      let isTime = name.hasSuffix("_nanoseconds")
      let title = (isTime ? String(name.dropLast(12)) : name).replacing("_", with: " ")
      print(
        "  " + title.padding(toLength: max(16, title.count + 1), withPad: " ", startingAt: 0)
          + (isTime ? Terminal.duration(value) : "\(value)"))
    }
  }
}

/// Lets a guest go.
struct StopCommand: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "stop",
    abstract: "Fill a session completely, and let its VM run on without the daemon.",
    discussion: """
      Nothing is taken from the guest: all pages that it has not touched are filled first. A page
      without right content is a memory error from then on.
      """)

  @Argument(help: "The session, as `faultline ps` names it.")
  var session: String
  @Flag(help: "Do not wait until it is filled.")
  var noWait = false
  @OptionGroup var control: ControlOptions

  func run() throws {
    let target = "/v1/sessions/\(try identifier(session))"
    let answer = try control.client.request("DELETE", target)
    guard !noWait else { return control.json ? control.printJSON(answer) : () }
    let progress = ProgressLine("filling")
    defer { progress.finish() }
    while true {
      let list: ControlMessage.SessionList = try ControlClient.decode(
        try control.client.request("GET", "/v1/sessions"))
      guard let found = list.sessions.first(where: { $0.id == session }) else { break }
      guard found.state != "serving" else {
        throw CommandFailure(
          "session \(session) stays: pages are missing and cannot be filled; the daemon's log "
            + "says why")
      }
      progress.callback?(found.fill.done, found.fill.total)
      usleep(50_000)
    }
    progress.finish()
    if control.json { control.printJSON(answer) } else { print("session \(session) is let go of") }
  }
}

/// A session's name, as part of a path.
func identifier(_ text: String) throws -> String {
  guard !text.isEmpty, text.count <= 20, text.allSatisfy({ $0.isASCII && $0.isNumber }) else {
    throw ValidationError("\(Terminal.plain(text)) is no session: `faultline ps` lists them")
  }
  return text
}
