// SPDX-License-Identifier: Apache-2.0

internal import GuestMemory
internal import HandoverClient
internal import HandoverProtocol
internal import LinuxSystem
internal import MemoryImage
internal import Pager
internal import Snapshot
internal import SystemPackage

/// Listens to the service while a guest runs.
final class HandoverWatch: Sendable {
  private static var failureLimit: Int { 64 }

  /// The connection: it is the session.
  let client: HandoverClient
  private let start: HostAddress
  private let guestAddress: GuestAddress
  private let options: HandoverOptions
  private let stopSign: EventDescriptor
  private let state = Monitor(State())

  private struct State {
    var failureCount = 0
    var failures: [String] = []
    /// All memory is there, and the service is needed no more.
    var isLetGo = false
  }

  /// - Parameters:
  ///   - start: where the guest's memory begins in this process.
  ///   - guestAddress: where the guest has that.
  init(
    _ client: HandoverClient, _ start: HostAddress, _ guestAddress: GuestAddress,
    _ options: HandoverOptions
  ) throws(SnapshotError) {
    self.client = client
    self.start = start
    self.guestAddress = guestAddress
    self.options = options
    do throws(Errno) {
      stopSign = try EventDescriptor()
    } catch {
      throw SnapshotError(.pager, "no eventfd for what the service tells: \(error)")
    }
  }

  /// What was told of damaged pages so far.
  var failures: (count: Int, descriptions: [String]) {
    state.withLock { ($0.failureCount, $0.failures) }
  }

  /// Waits until a damaged page was told of, for 2 s at most: the service tells of it a moment
  /// after the guest was stopped there.
  func awaitFailure() {
    let deadline = MonotonicClock.nanoseconds + 2_000_000_000
    _ = state.wait(until: deadline) { $0.failureCount > 0 ? () : nil }
  }

  /// Has `run` return, once it has read what is there.
  func stop() { stopSign.signal() }

  /// Listens until `stop` is called or the service is gone.
  func run() {
    let set = PollSet(client.descriptor, stopSign.descriptor.rawValue)
    while true {
      guard let ready = try? set.wait() else { continue }
      let isStopping = ready.tag == 1
      do throws(HandoverClientError) {
        while let status = try client.nextStatus() {
          take(status)
          if status.event == "ended", !isStopping {
            options.onEnd?("the service has ended the session: \(status.message)")
            return
          }
        }
      } catch {
        if !isStopping, !state.withLock({ $0.isLetGo }) { options.onEnd?(error.description) }
        return
      }
      if isStopping { return }
    }
  }

  private func take(_ status: HandoverStatus) {
    if status.dropped > 0 {
      options.onNotice?("\(status.dropped) messages of the service were lost")
    }
    switch status.event {
    case "poisoned":
      let place = status.hostAddress.map { HostAddress($0) } ?? start
      let page = guestAddress.advanced(by: start.distance(to: place))
      let text =
        "guest page \(page) (\((status.length ?? 4096) / 1024) KiB): \(status.message); poisoned, "
        + "a touch is a memory fault"
      state.withLock { state in
        state.failureCount += 1
        if state.failures.count < Self.failureLimit { state.failures.append(text) }
      }
      options.onNotice?(text)
    case "detached":
      state.withLock { $0.isLetGo = true }
      options.onNotice?("all memory is there, and the service has let go of it: \(status.message)")
    default:
      // "filled", and what is newer.
      break
    }
  }
}
