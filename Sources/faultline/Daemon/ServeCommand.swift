// SPDX-License-Identifier: Apache-2.0

import ArgumentParser
import DaemonConfiguration
import FaultlineDaemon
import Foundation
import SystemPackage

/// The daemon.
struct ServeCommand: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "serve",
    abstract: "Serve the memory of many VMs: a page-fault handler for Firecracker and others.",
    discussion: """
      Listens on a Unix socket, takes over the memory that a VMM hands over (docs/firecracker.md,
      docs/handover.md), and fills it from an image, page by page as the guest touches it.

      faultline serve --socket /run/faultline/fc.sock --image /var/lib/faultline/base.img
      faultline serve --socket /run/fl.sock --handover faultline --image '/images/{image}.img'
      faultline serve --config /etc/faultline.yaml          many sockets, docs/configuration.md

      SIGTERM, or ^C: no more VMs are taken, those that there are are filled, and then run without
      the daemon. After --drain-timeout, or at a second signal, they are let go of as they are, and
      pages that are missing are memory errors. Exit status: 0 all have their memory; 1 it did not
      start; 3 a VM was let go of with pages missing or damaged (docs/control.md).
      """)

  @Option(help: "A configuration file; then no other option.", completion: .file())
  var config: String?
  @Option(help: "The socket on which VMMs hand over.", completion: .file())
  var socket: String?
  @Option(
    help: "The image; {image}, {name}, {uid} and {pid} stand for what the VMM is.",
    completion: .file())
  var image: String?
  @Option(help: "What VMMs speak: firecracker or faultline. (default: firecracker)")
  var handover: String?
  @Option(help: "The permissions of the socket: who may connect. (default: 0600)")
  var mode: String?
  @Option(
    name: .customLong("allow-uid"),
    help: "A user whose VMMs may hand over; may be given several times. (default: all that connect)"
  )
  var allowUID: [UInt32] = []
  @Option(help: "Threads that serve faults. (default: 2)")
  var faultThreads: String?
  @Option(help: "VMs at a time; another one is refused. (default: 4096)")
  var maxSessions: String?
  @Option(help: "Bytes a second that each session is filled in the background. (default: 0)")
  var fillRate: String?
  @Flag(help: "Remember the order in which guests touch pages.")
  var record = false
  @Option(help: "How long a page may take before it is given up. (default: 30s)")
  var sourceTimeout: String?
  @Option(help: "A page without right content: poison, wait or stop-vmm. (default: poison)")
  var onDamage: String?
  @Option(help: "The socket for operators, such as `faultline ps`.", completion: .file())
  var controlSocket: String?
  @Option(help: "Where Prometheus finds metrics: HOST:PORT.")
  var metrics: String?
  @Option(
    help: "Bytes of clean pages that are kept for clones. (default: those that clones have)")
  var cacheSize: String?
  @Option(help: "How long a stop waits until all sessions are filled. (default: 60s)")
  var drainTimeout: String?
  @Option(help: "trace, debug, info, warning or error. (default: info)")
  var logLevel: String?
  @Option(help: "text or json. (default: text)")
  var logFormat: String?

  func validate() throws {
    guard config != nil || (socket != nil && image != nil) else {
      throw ValidationError("--socket and --image are needed, or --config")
    }
    guard config == nil || (common.isEmpty && listen.isEmpty) else {
      throw ValidationError("--config stands alone: put the other options into the file")
    }
  }

  func run() throws {
    let daemon = try Daemon(
      try configured(), environment: ProcessInfo.processInfo.environment)
    if case .interrupted = try daemon.run() { throw ExitCode(3) }
  }

  // MARK: - Options as a configuration

  private func configured() throws -> DaemonConfiguration {
    if let config { return try DaemonConfiguration(file: FilePath(config)) }
    // The same names, the same rules, and the same words for what is wrong.
    var text = "listen:\n"
    for (index, (key, value)) in listen.enumerated() {
      text += (index == 0 ? "  - " : "    ") + "\(key): \(value)\n"
    }
    for (key, value) in common { text += "\(key): \(value)\n" }
    do {
      return try DaemonConfiguration(yaml: text, file: "options")
    } catch {
      throw CommandFailure(error.reason)
    }
  }

  private var listen: [(String, String)] {
    var pairs: [(String, String?)] = [
      ("socket", socket.map(Self.absolute)), ("image", image.map(Self.absolute)),
      ("handover", handover), ("mode", mode),
    ].map { ($0, $1.map(Self.quoted)) }
    if !allowUID.isEmpty {
      pairs.append(("allow-uid", "[\(allowUID.map(String.init).joined(separator: ", "))]"))
    }
    return pairs.compactMap { key, value in value.map { (key, $0) } }
  }

  private var common: [(String, String)] {
    [
      ("fault-threads", faultThreads), ("max-sessions", maxSessions), ("fill-rate", fillRate),
      ("record", record ? "true" : nil),
      ("source-timeout", sourceTimeout), ("on-damage", onDamage),
      ("control-socket", controlSocket.map(Self.absolute)), ("metrics", metrics),
      ("cache-size", cacheSize), ("drain-timeout", drainTimeout), ("log-level", logLevel),
      ("log-format", logFormat),
    ].compactMap { key, value in
      value.map { (key, key == "record" ? $0 : Self.quoted($0)) }
    }
  }

  private static func absolute(_ path: String) -> String {
    path.hasPrefix("/") ? path : FileManager.default.currentDirectoryPath + "/" + path
  }

  /// A scalar of YAML that says nothing but this.
  private static func quoted(_ text: String) -> String {
    "'" + text.replacing("'", with: "''").replacing("\n", with: " ") + "'"
  }
}
