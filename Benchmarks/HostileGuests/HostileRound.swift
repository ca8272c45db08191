// SPDX-License-Identifier: Apache-2.0

public import Foundation

/// A round: hostile guests and an honest one, on one service.
public struct HostileRound: Sendable {
  /// What the service may take more than when it is idle, whatever its guests do.
  public enum Bounds {
    /// KiB. States, buffers and claims of a session with 16 MiB are some 100 KiB, the pieces of two
    /// fault threads and four readers 256 KiB each, a message of a hand-over 256 KiB: hundreds of
    /// connections at a time are 64 MiB.
    public static let memoryKiB = 128 << 10
    /// A socket has 1024 places for connections that have not said all and for descriptors that came
    /// with them; as many may wait for a thread that looks at what they sent, of which there are 128,
    /// each with 16 descriptors.
    public static let descriptors = 4608
    /// 128 that look at hand-overs, 16 that close what came, and those that wait for the source (4 for
    /// a session).
    public static let threads = 192
    /// Lines of the log a second, of all guests together, and how many more may come at once.
    public static let logLines = 100
    /// KiB that are left when the hostile guests are gone: what malloc keeps.
    public static let memoryLeftKiB = 16 << 10
    /// Of a processor, when nobody does anything.
    public static let idleShare = 0.2
  }

  /// What the hostile guests do.
  public let scenario: HostileScenario
  /// How long the honest guest is beside them.
  public let seconds: Double
  private let command: URL

  /// - Parameter command: the executable `faultline`.
  public init(_ scenario: HostileScenario, seconds: Double, command: URL) {
    self.scenario = scenario
    self.seconds = seconds
    self.command = command
  }

  /// What came of it.
  public struct Report: Sendable {
    /// The honest guest.
    public var honest: GuestReport
    /// The hostile ones.
    public var hostile: [GuestReport]
    /// What must not be: one line for each.
    public var violations: [String] = []
  }

  /// The honest guest beside hostile ones that the service serves.
  public func served() throws -> Report {
    try inDirectory { directory in
      var launcher: [String] = []
      if case .descriptors(let count) = scenario.surroundings {
        launcher = ["/usr/bin/prlimit", "--nofile=\(count)"]
      }
      let service = try ObservedService(command, in: directory, launcher: launcher)
      // What is made at the first use stays; threads that came for it alone go a second later.
      let warmUp = try honest(service, milliseconds: 100).report(within: 60)
      guard warmUp.status == 0 else {
        throw HostileFailure("the honest guest is not served alone: \(warmUp)")
      }
      usleep(1_500_000)
      let idle = service.usage
      let start = ContinuousClock.now
      let ((honestReport, hostileReports), peak) = try service.observed {
        try play(service, directory, isServed: true)
      }
      let lasted = (ContinuousClock.now - start) / .seconds(1)
      var report = Report(honest: honestReport, hostile: hostileReports)
      report.violations = honestViolations(honestReport) + hostileReports.flatMap(hostileViolations)
      report.violations += violations(of: service, idle: idle, peak: peak, seconds: lasted)
      return report
    }
  }

  /// The same, but the others are plain processes that nobody serves.
  public func besidePlainLoad() throws -> Report {
    try inDirectory { directory in
      let service = try ObservedService(command, in: directory)
      _ = try honest(service, milliseconds: 100).report(within: 60)
      let (honestReport, others) = try play(service, directory, isServed: false)
      var report = Report(honest: honestReport, hostile: others)
      report.violations = honestViolations(honestReport)
      return report
    }
  }

  // MARK: - The guests

  /// - Parameter isOnce: it keeps its first memory, which lasts for about all of its time.
  private func honest(
    _ service: ObservedService, milliseconds: Int, isOnce: Bool = false
  ) throws -> RoleProcess {
    try RoleProcess(
      command, in: service.directory, "honest",
      [
        "socket=\(service.firecrackerSocket)", "protocol=firecracker", "pages=4096",
        "milliseconds=\(milliseconds)", "seed=\(UInt32.random(in: 1...UInt32.max))",
      ] + (isOnce ? ["other=once", "pause-us=\(milliseconds * 1000 / 5000)"] : ["pause-us=0"]))
  }

  private func play(
    _ service: ObservedService, _ directory: String, isServed: Bool
  ) throws -> (honest: GuestReport, others: [GuestReport]) {
    // Where the service has no thread left it may refuse whoever comes then.
    var early: RoleProcess?
    if case .noThreads = scenario.surroundings {
      early = try honest(service, milliseconds: Int(seconds * 1000) + 600, isOnce: true)
      usleep(300_000)
    }
    let groups =
      isServed
      ? try ControlGroups(scenario.surroundings, service: service.identifier) : nil
    defer { groups?.remove() }
    var words = scenario.words + ["milliseconds=\(Int(seconds * 1000) + 500)"]
    if isServed {
      let socket = scenario.isFirecracker ? service.firecrackerSocket : service.handoverSocket
      words += ["socket=\(socket)", "control=\(service.controlSocket)"]
    }
    if let group = groups?.guest { words.append("other=\(group)") }
    let others = try (0..<scenario.copies).map { number in
      try RoleProcess(command, in: directory, scenario.role, words + ["seed=\(number + 1)"])
    }
    usleep(300_000)
    // A Firecracker's sessions last as long as its process; few descriptors are enough for one.
    var isOnce = false
    if case .descriptors = scenario.surroundings { isOnce = true }
    let honest =
      try early ?? honest(service, milliseconds: Int(seconds * 1000), isOnce: isOnce)
    return (honest.report(within: seconds + 60), others.map { $0.report(within: 20) })
  }

  private func inDirectory<Value>(_ body: (String) throws -> Value) throws -> Value {
    let directory = FileManager.default.temporaryDirectory.path + "/faultline-hostile-\(UUID())"
    try FileManager.default.createDirectory(atPath: directory, withIntermediateDirectories: false)
    defer { try? FileManager.default.removeItem(atPath: directory) }
    return try body(directory)
  }

  // MARK: - What must not be

  private func honestViolations(_ report: GuestReport) -> [String] {
    var found: [String] = []
    if report["wrong"] > 0 { found.append("the honest guest has \(report["wrong"]) wrong pages") }
    if report["errors"] > 0 {
      found.append("the honest guest has \(report["errors"]) memory errors")
    }
    if report["stuck"] >= 1_000_000 {
      found.append("the honest guest waits for a page")
    } else if report["stuck"] > 0 {
      found.append(
        "the honest guest was refused \(report["stuck"]) times: \(report.words.prefix(300))")
    }
    if report.status < 0 { found.append("the honest guest ended with signal \(-report.status)") }
    if report["touches"] < 1 { found.append("the honest guest touched nothing") }
    return found
  }

  private func hostileViolations(_ report: GuestReport) -> [String] {
    if report["wrong"] > 0 {
      return [
        "a hostile guest has \(report["wrong"]) pages that are neither content nor zeros that it asked "
          + "for (of \(report["touches"]) touches \(report["zeros"]) zeros, \(report["errors"]) errors)"
      ]
    }
    // Without a thread for it the service may refuse whom it would serve.
    if case .noThreads = scenario.surroundings, report.wasRefused { return [] }
    if report.wasRefused != scenario.isRefused {
      return [scenario.isRefused ? "a hostile guest was not refused" : "refused: \(report.words)"]
    }
    if report.cannotBeDone { return ["the scenario could not be played: \(report.words)"] }
    return []
  }

  private func violations(
    of service: ObservedService, idle: ObservedService.Usage, peak: ObservedService.Usage,
    seconds: Double
  ) -> [String] {
    guard service.isRunning else {
      let status = service.end(within: 1) ?? 0
      return ["the service ended with \(status): \(service.messages.suffix(500))"]
    }
    var found: [String] = []
    func limit(_ what: String, _ value: Int, _ most: Int) {
      if value > most { found.append("\(what): \(value), and \(most) are allowed") }
    }
    limit("KiB of memory", peak.anonymousKiB - idle.anonymousKiB, Bounds.memoryKiB)
    limit("descriptors", peak.descriptors - idle.descriptors, Bounds.descriptors)
    limit("threads", peak.threads - idle.threads, Bounds.threads)
    let lines = service.messages.split(separator: "\n", omittingEmptySubsequences: true)
    limit("lines of log", lines.count, Int(seconds * Double(Bounds.logLines)) + Bounds.logLines)
    if let line = lines.first(where: { $0.hasPrefix("2026-01-01T") || $0.contains("\u{1b}") }) {
      found.append("a guest wrote a line of the log: \(line)")
    }
    // The hostile guests are gone, and everything comes back.
    _ = waits(seconds: 15) {
      let usage = service.usage
      return usage.descriptors <= idle.descriptors && usage.threads <= idle.threads + 2
        && usage.anonymousKiB - idle.anonymousKiB <= Bounds.memoryLeftKiB
    }
    let left = service.usage
    limit("descriptors that stay", left.descriptors, idle.descriptors)
    if left.descriptors > idle.descriptors {
      found.append("open: " + service.openFiles.sorted().joined(separator: ", "))
    }
    limit("threads that stay", left.threads, idle.threads + 2)
    limit("KiB that stay", left.anonymousKiB - idle.anonymousKiB, Bounds.memoryLeftKiB)
    if let next = try? honest(service, milliseconds: 100).report(within: 60) {
      found += honestViolations(next).map { "afterwards: \($0)" }
    }
    usleep(300_000)
    let busy = service.processorTime
    usleep(500_000)
    let share = (service.processorTime - busy) / 0.5
    if share > Bounds.idleShare {
      found.append("\(Int(share * 100)) % of a processor with nobody there")
    }
    switch service.end(within: 60) {
    case 0, 3: break
    case nil: found.append("the service does not end by SIGTERM")
    case .some(let status):
      found.append("the service ended with \(status) at SIGTERM: \(service.messages.suffix(500))")
    }
    return found
  }
}
