// SPDX-License-Identifier: Apache-2.0

internal import FlyingFox
internal import FlyingSocks
internal import Foundation
internal import LinuxSystem
internal import Logging
internal import MemoryImage
internal import Pager
internal import Synchronization
internal import SystemPackage

/// The control API (docs/control.md). What may take long runs in threads of its own.
final class ControlService: Sendable {
  /// The version that `health` says.
  static let version = "0.1.0"
  private static let bodyLimit = 65_536

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
  func plainAnswer(_ path: String) -> PlainAnswer? {
    switch path {
    case "/metrics":
      return PlainAnswer(
        contentType: MetricsText.contentType,
        body: MetricsText(registry, images: images.count, caches, logWriter.dropped).text)
    case "/v1/health", "/health":
      let isDraining = isDraining.load(ordering: .acquiring)
      let health = ControlMessage.Health(
        status: isDraining ? "draining" : "ok", version: Self.version, sessions: registry.count)
      return PlainAnswer(
        status: isDraining ? "503 Service Unavailable" : "200 OK",
        body: String(decoding: Self.json(health), as: UTF8.self))
    default: return nil
    }
  }

  /// Adds all paths to the server of the control socket.
  func addRoutes(to server: HTTPServer) async {
    for path in ["/metrics", "/v1/health", "/health"] {
      await server.appendRoute(HTTPRoute("GET \(path)")) { [self] _ in
        guard let answer = plainAnswer(path) else { return failure(.notFound, path) }
        return HTTPResponse(
          statusCode: answer.status.hasPrefix("200") ? .ok : .serviceUnavailable,
          headers: [.contentType: answer.contentType], body: Data(answer.body.utf8))
      }
    }
    await server.appendRoute("GET /v1/sessions") { [self] _ in
      answer(
        .ok,
        ControlMessage.SessionList(
          sessions: registry.all.map { $0.summary(withStatistics: false) }))
    }
    await addRoute(server, "GET /v1/sessions/:id") { [self] session, _ in
      answer(.ok, session.summary(withStatistics: true))
    }
    await addRoute(server, "DELETE /v1/sessions/:id") { [self] session, _ in
      guard supervisor.detach(session, "an operator detached it") else {
        return notServing(session)
      }
      return answer(.accepted, session.summary(withStatistics: false))
    }
    await addRoute(server, "POST /v1/sessions/:id/fill") { [self] session, body in
      let request =
        body.isEmpty
        ? ControlMessage.FillRequest()
        : try JSONDecoder().decode(ControlMessage.FillRequest.self, from: body)
      guard (request.rate ?? 1) > 0 else {
        return failure(.badRequest, "\"rate\" is not at least 1 byte a second")
      }
      guard session.currentPhase == .serving else { return notServing(session) }
      session.pager.stopFill()
      try session.startFill(rate: request.rate, replays: false)
      return answer(.accepted, session.summary(withStatistics: false))
    }
    await addRoute(server, "DELETE /v1/sessions/:id/fill") { [self] session, _ in
      // What lets go of a guest needs it filled.
      guard session.currentPhase == .serving else { return notServing(session) }
      session.pager.stopFill()
      return answer(.accepted, session.summary(withStatistics: false))
    }
    await addRoute(server, "GET /v1/sessions/:id/working-set") { [self] session, _ in
      answer(
        .ok,
        ControlMessage.WorkingSetList(
          runs: session.pager.recordedWorkingSet.map {
            ControlMessage.Run(
              region: $0.region, firstBlock: $0.firstBlock, blockCount: $0.blockCount)
          }))
    }
    await addRoute(server, "POST /v1/sessions/:id/working-set") { [self] session, _ in
      guard session.pager.hasRecorded else {
        return failure(.conflict, "session \(session.id) has not recorded (`faultline record`)")
      }
      let blocks = try session.storeWorkingSet()
      log.info("\(blocks) blocks of session \(session.id) are the image's working set now")
      return answer(.ok, session.summary(withStatistics: false))
    }
    await addRoute(server, "POST /v1/sessions/:id/recording") { [self] session, _ in
      guard session.currentPhase == .serving else { return notServing(session) }
      try session.pager.startRecording()
      return answer(.ok, session.summary(withStatistics: false))
    }
    await addRoute(server, "DELETE /v1/sessions/:id/recording") { [self] session, _ in
      session.pager.stopRecording()
      return answer(.ok, session.summary(withStatistics: false))
    }
    await addRoute(server, "POST /v1/sessions/:id/retry") { [self] session, _ in
      session.pager.retryFailed()
      return answer(.accepted, session.summary(withStatistics: false))
    }
    await server.appendRoute("*") { [self] request in
      failure(.notFound, "\(request.method.rawValue) \(request.path) is not in docs/control.md")
    }
  }

  /// A route of one session, whose body may wait: it runs in a thread of its own, because the
  /// cooperative pool has one for each processor.
  private func addRoute(
    _ server: HTTPServer, _ route: String,
    _ body: @escaping @Sendable (GuestSession, Data) throws -> HTTPResponse
  ) async {
    await server.appendRoute(HTTPRoute(route)) { [self] request in
      let id = request.routeParameters["id"] ?? ""
      guard let session = registry[id] else {
        return failure(.notFound, "there is no session \(id)")
      }
      let length = request.headers[.contentLength].flatMap(Int.init) ?? 0
      guard request.headers[.transferEncoding] == nil, length <= Self.bodyLimit else {
        return failure(.payloadTooLarge, "a body has at most \(Self.bodyLimit) bytes")
      }
      let data = length > 0 ? try await request.bodyData : Data()
      do {
        return try await Self.inThread { try body(session, data) }
      } catch let error as DecodingError {
        return failure(.badRequest, "the body is not as in docs/control.md: \(error)")
      } catch {
        return failure(.internalServerError, "\(error)")
      }
    }
  }

  private static func inThread(
    _ body: @escaping @Sendable () throws -> HTTPResponse
  ) async throws -> HTTPResponse {
    try await withCheckedThrowingContinuation { continuation in
      do throws(Errno) {
        _ = try NamedThread(name: "control") {
          continuation.resume(with: Result { try body() })
        }
      } catch {
        continuation.resume(throwing: error)
      }
    }
  }

  // MARK: - Answers

  private static func json(_ value: some Encodable) -> Data {
    let encoder = JSONEncoder()
    encoder.keyEncodingStrategy = .convertToSnakeCase
    encoder.outputFormatting = [.sortedKeys, .withoutEscapingSlashes]
    return ((try? encoder.encode(value)) ?? Data()) + Data("\n".utf8)
  }

  private func answer(_ status: HTTPStatusCode, _ value: some Encodable) -> HTTPResponse {
    HTTPResponse(
      statusCode: status, headers: [.contentType: "application/json"], body: Self.json(value))
  }

  private func notServing(_ session: GuestSession) -> HTTPResponse {
    failure(.conflict, "session \(session.id) is \(session.currentPhase.rawValue)")
  }

  private func failure(_ status: HTTPStatusCode, _ text: String) -> HTTPResponse {
    answer(status, ControlMessage.Failure(error: text))
  }
}

/// FlyingFox's own messages, at the level of the daemon's log.
struct HTTPLog: FlyingSocks.Logging {
  let log: DaemonLogger
  func logDebug(_ debug: @autoclosure () -> String) { log.trace("\(debug())") }
  func logInfo(_ info: @autoclosure () -> String) { log.debug("\(info())") }
  func logWarning(_ warning: @autoclosure () -> String) { log.debug("\(warning())") }
  func logError(_ error: @autoclosure () -> String) { log.debug("\(error())") }
  func logCritical(_ critical: @autoclosure () -> String) { log.debug("\(critical())") }
}
