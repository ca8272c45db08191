// SPDX-License-Identifier: Apache-2.0

internal import FlyingFox
internal import Foundation
internal import LinuxSystem
internal import Synchronization

/// FlyingFox's server of the control socket, and the task that it runs in.
final class ControlServer: Sendable {
  private let server: HTTPServer
  private let task: Task<Void, Never>
  private let outcome: Outcome

  private final class Outcome: Sendable {
    /// Whether it listens, or why not.
    let start = Monitor<Result<Void, any Error>?>(nil)
    let hasEnded = Atomic<Bool>(false)
  }

  /// Starts it and waits until it listens.
  init(_ server: HTTPServer, _ service: ControlService) throws {
    let outcome = Outcome()
    self.server = server
    self.outcome = outcome
    task = Task.detached {
      await service.addRoutes(to: server)
      do {
        try await server.run()
      } catch {
        outcome.start.withLock { $0 = $0 ?? .failure(error) }
      }
      outcome.hasEnded.store(true, ordering: .releasing)
    }
    Task.detached {
      guard (try? await server.waitUntilListening(timeout: 60)) != nil else { return }
      outcome.start.withLock { $0 = $0 ?? .success(()) }
    }
    do {
      try outcome.start.wait { $0 }.get()
    } catch {
      throw DaemonError("the control socket cannot be opened: \(error.localizedDescription)")
    }
  }

  /// Whether it answers no more.
  var hasEnded: Bool { outcome.hasEnded.load(ordering: .acquiring) }

  /// Ends it, without waiting for that.
  func stop() {
    let server = server
    task.cancel()
    Task.detached { await server.stop() }
  }
}
