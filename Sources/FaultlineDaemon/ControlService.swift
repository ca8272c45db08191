// SPDX-License-Identifier: Apache-2.0

internal import Foundation
internal import LinuxSystem
internal import Logging
internal import MemoryImage
internal import Pager
internal import Synchronization
internal import SystemPackage

/// The control API (docs/control.md).
final class ControlService: Sendable {
  /// The version that `health` says.
  static let version = "0.1.0"

  private let registry: SessionRegistry
  private let images: ImageRegistry
  private let caches: ImageCaches
  private let supervisor: Supervisor
  private let logWriter: LogWriter
  private let log: Logger
  let isDraining = Atomic<Bool>(false)

  init(
    _ registry: SessionRegistry, _ images: ImageRegistry, _ caches: ImageCaches,
    _ supervisor: Supervisor, _ logWriter: LogWriter, log: Logger
  ) {
    self.registry = registry
    self.images = images
    self.caches = caches
    self.supervisor = supervisor
    self.logWriter = logWriter
    self.log = log
  }

  /// What is known to everybody: health and metrics.
  func plainAnswer(_ request: HTTPRequest) -> HTTPAnswer {
    guard ["GET", "HEAD"].contains(request.method) else {
      return .failure(405, "there is GET only")
    }
    return plain(request.path) ?? .failure(404, "there are /metrics and /v1/health")
  }

  private func plain(_ path: String) -> HTTPAnswer? {
    switch path {
    case "/metrics":
      let text = MetricsText(registry, images: images.count, caches, logWriter.dropped).text
      return HTTPAnswer(contentType: MetricsText.contentType, body: Data(text.utf8))
    case "/v1/health", "/health":
      let isDraining = isDraining.load(ordering: .acquiring)
      let health = ControlMessage.Health(
        status: isDraining ? "draining" : "ok", version: Self.version, sessions: registry.count)
      return answer(isDraining ? 503 : 200, health)
    default: return nil
    }
  }

  /// What operators get. May take long: it is called in threads for that.
  func answer(_ request: HTTPRequest) -> HTTPAnswer {
    if ["GET", "HEAD"].contains(request.method), let answer = plain(request.path) { return answer }
    let unknown = HTTPAnswer.failure(
      404, "\(request.method) \(request.path) is not in docs/control.md")
    let parts = request.path.split(separator: "/", omittingEmptySubsequences: false).dropFirst()
    guard parts.starts(with: ["v1", "sessions"]), parts.count <= 4 else { return unknown }
    guard let id = parts.dropFirst(2).first else {
      guard request.method == "GET" else { return unknown }
      return answer(
        200,
        ControlMessage.SessionList(
          sessions: registry.all.map { $0.summary(withStatistics: false) }))
    }
    guard let session = registry[String(id)] else {
      return .failure(404, "there is no session \(id)")
    }
    do {
      let part = parts.dropFirst(3).first.map(String.init)
      return try answer(request, about: session, part) ?? unknown
    } catch let error as DecodingError {
      return .failure(400, "the body is not as in docs/control.md: \(error)")
    } catch let error as ImageError where error.code == .changed {
      return .failure(409, "\(error)")
    } catch let error as PagerError where error.errno == .resourceTemporarilyUnavailable {
      return .failure(503, "\(error)")
    } catch {
      return .failure(500, "\(error)")
    }
  }

  private func answer(
    _ request: HTTPRequest, about session: GuestSession, _ part: String?
  ) throws -> HTTPAnswer? {
    switch (request.method, part) {
    case ("GET", nil): return answer(200, session.summary(withStatistics: true))
    case ("DELETE", nil):
      guard supervisor.detach(session, "an operator detached it") else {
        return notServing(session)
      }
    case ("POST", "fill"):
      let wanted =
        request.body.isEmpty
        ? ControlMessage.FillRequest()
        : try JSONDecoder().decode(ControlMessage.FillRequest.self, from: request.body)
      guard (wanted.rate ?? 1) > 0 else {
        return .failure(400, "\"rate\" is not at least 1 byte a second")
      }
      guard session.currentPhase == .serving else { return notServing(session) }
      session.pager.stopFill()
      try session.startFill(rate: wanted.rate, replays: false)
    case ("DELETE", "fill"):
      // What lets go of a guest needs it filled.
      guard session.currentPhase == .serving else { return notServing(session) }
      session.pager.stopFill()
    case ("POST", "retry"): session.pager.retryFailed()
    case ("GET", "working-set"):
      return answer(
        200,
        ControlMessage.WorkingSetList(
          runs: session.pager.recordedWorkingSet.map {
            ControlMessage.Run(
              region: $0.region, firstBlock: $0.firstBlock, blockCount: $0.blockCount)
          }))
    case ("POST", "working-set"):
      guard session.pager.hasRecorded else {
        return .failure(409, "session \(session.id) has not recorded (`faultline record`)")
      }
      let blocks = try session.storeWorkingSet()
      log.info("\(blocks) blocks of session \(session.id) are the image's working set now")
      return answer(200, session.summary(withStatistics: false))
    case ("POST", "recording"):
      guard session.currentPhase == .serving else { return notServing(session) }
      try session.pager.startRecording()
      return answer(200, session.summary(withStatistics: false))
    case ("DELETE", "recording"):
      session.pager.stopRecording()
      return answer(200, session.summary(withStatistics: false))
    default: return nil
    }
    return answer(202, session.summary(withStatistics: false))
  }

  // MARK: - Answers

  private func answer(_ status: Int, _ value: some Encodable) -> HTTPAnswer {
    let encoder = JSONEncoder()
    encoder.keyEncodingStrategy = .convertToSnakeCase
    encoder.outputFormatting = [.sortedKeys, .withoutEscapingSlashes]
    return HTTPAnswer(
      status: status, body: ((try? encoder.encode(value)) ?? Data()) + Data("\n".utf8))
  }

  private func notServing(_ session: GuestSession) -> HTTPAnswer {
    .failure(409, "session \(session.id) is \(session.currentPhase.rawValue)")
  }
}
