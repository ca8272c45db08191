// SPDX-License-Identifier: Apache-2.0

public import HandoverProtocol
public import LinuxSystem
internal import Synchronization
internal import SystemPackage

/// The service's end of a hand-over by docs/handover.md: `receive`, which also answers `open`,
/// then `accept` or `refuse`, then `push`. It is the lifetime of the session on both sides.
///
/// `receive` waits for the VMM, in a thread for each. `collect` and `take` do not: one thread can
/// collect what any number of VMMs send, and have another one take what is complete.
///
/// Sending never waits for the VMM.
public final class HandoverConnection: Sendable {
  /// The connection, for waiting until the VMM has gone: EPOLLRDHUP (epoll_ctl(2)).
  public let socket: UnixSocket
  /// What is taken from the VMM.
  let limits: HandoverLimits
  private let incoming: Mutex<Incoming>
  private let outbox = Mutex(Outbox())

  /// What came, and what was answered to it.
  private struct Incoming: ~Copyable {
    var inbox: HandoverInbox
    var opened: (request: OpenRequest, offer: ImageOffer)?
  }

  /// What did not fit into the socket's buffer.
  private struct Outbox {
    /// The rest of a frame whose beginning was sent.
    var rest: [UInt8] = []
    /// Status messages that were lost since the last one that was sent.
    var dropped = 0
  }

  /// Takes over a connection that was accepted.
  public init(
    _ socket: consuming UnixSocket, framing: HandoverFraming = .frames,
    limits: HandoverLimits = HandoverLimits()
  ) {
    self.socket = socket
    self.limits = limits
    incoming = Mutex(Incoming(inbox: HandoverInbox(framing, limits)))
  }

  // MARK: - The request

  /// Receives and checks what the VMM hands over. A VMM that is refused is told why, and
  /// every descriptor that came is closed; then this throws.
  ///
  /// - Parameters:
  ///   - allowedUsers: who may hand over; `nil` for everybody who could connect.
  ///   - stopSign: a descriptor that ends the wait when it can be read; -1 for none.
  ///   - open: what a VMM gets that wants to be a clone; without it there are none. Called once
  ///     at most. When the VMM leaves afterwards, this throws `.disconnected`.
  public func receive(
    allowedUsers: Set<UInt32>? = nil, stopSign: CInt = -1,
    open: ((OpenRequest) throws(HandoverError) -> ImageOffer)? = nil
  ) throws(HandoverError) -> HandoverRequest {
    let deadline = limits.deadline
    defer { withInbox { _ = $0.takeDescriptors() } }
    while true {
      if let request = try take(allowedUsers: allowedUsers, open: open) { return request }
      do throws(HandoverError) {
        try socket.awaitHandover(before: deadline, stopSign: stopSign)
      } catch {
        throw refused(error, try? socket.peer)
      }
      _ = collect()
    }
  }

  /// Takes in what the VMM has sent, once, without waiting for it.
  ///
  /// - Returns: whether `take` has an answer.
  public func collect() -> Bool {
    incoming.withLock { incoming in
      incoming.inbox.collect(from: socket)
      return incoming.inbox.isReady
    }
  }

  /// Whether a descriptor that was collected is neither a userfaultfd nor a memfd. Waits for nobody:
  /// what one of another kind is cannot be asked without that.
  public var hasForeignDescriptors: Bool {
    let kinds = DescriptorKinds.ofThisKernel
    return withInbox { inbox in inbox.descriptors.rawValues.contains { !kinds.has($0) } }
  }

  /// Ends the connection for both sides, without closing it: nothing can be sent any more.
  public func hangUp() { socket.hangUp() }

  /// Descriptors that were collected, and not taken.
  public var descriptorCount: Int { incoming.withLock { $0.inbox.descriptors.count } }

  /// What was collected, as `receive`; `nil` when its message is not complete. One thread at a
  /// time. When this throws, descriptors may be left, which go with the connection.
  public func take(
    allowedUsers: Set<UInt32>? = nil,
    open: ((OpenRequest) throws(HandoverError) -> ImageOffer)? = nil
  ) throws(HandoverError) -> HandoverRequest? {
    var peer: PeerCredentials?
    do throws(HandoverError) {
      let sender = try Sender(socket, allowedUsers: allowedUsers)
      peer = sender.credentials
      while let payload = try withInbox({ (inbox) throws(HandoverError) in try inbox.next() }) {
        let message: VMMMessage
        do throws(ProtocolError) {
          message = try VMMMessage(decoding: payload)
        } catch {
          throw HandoverError(error)
        }
        switch message {
        case .attach(let message):
          // What follows it is dropped, as it would be if it came later.
          return try HandoverRequest(
            message, withInbox { $0.takeDescriptors() }, limits: limits, peer: sender.credentials,
            process: try sender.openProcess(socket), opened: opened)
        case .open(let message):
          guard let open else {
            throw HandoverError(.unsupported, "there are no clones here")
          }
          guard opened == nil else { throw HandoverError(.malformed, "\"open\" came twice") }
          let request = try OpenRequest(message, peer: sender.credentials)
          let offer = try open(request)
          try send(offer)
          incoming.withLock { $0.opened = (request, offer) }
        }
      }
      return nil
    } catch {
      throw refused(error, peer)
    }
  }

  /// Tells the VMM why it is not served.
  private func refused(_ error: HandoverError, _ peer: PeerCredentials?) -> HandoverError {
    let complete = peer.map { error.from($0) } ?? error
    refuse(complete)
    return complete
  }

  private var opened: (request: OpenRequest, offer: ImageOffer)? { incoming.withLock { $0.opened } }

  func withInbox<Value: ~Copyable, Failure: Error>(
    _ body: (inout HandoverInbox) throws(Failure) -> sending Value
  ) throws(Failure) -> sending Value {
    try incoming.withLock { (incoming) throws(Failure) in try body(&incoming.inbox) }
  }

  /// Sends what a clone gets. Nothing was sent before, so there is room for it.
  private func send(_ offer: ImageOffer) throws(HandoverError) {
    let frame: [UInt8]
    do throws(ProtocolError) {
      frame = try ServiceMessage.image(offer.message).frame()
    } catch {
      throw HandoverError(error)
    }
    let descriptors = try offer.makeDescriptors()
    do throws(Errno) {
      try socket.send(frame, descriptors: descriptors.rawValues)
    } catch {
      throw HandoverError(
        error == .brokenPipe || error == .connectionReset ? .disconnected : .inputOutput,
        "the image's pages cannot be sent", errno: error)
    }
  }

  // MARK: - Answers

  /// Tells the VMM that it is served from here on.
  ///
  /// - Parameter session: the service's name for the session.
  /// - Returns: whether the VMM can get it.
  @discardableResult
  public func accept(session: String) -> Bool { send(.ok(session: session)) }

  /// Tells the VMM why it is not served. Close the connection after this: let go of it.
  public func refuse(_ error: HandoverError) {
    send(
      .error(
        code: error.code.name, message: error.reasonInFull,
        versions: error.code == .unsupportedVersion ? [HandoverFrame.version] : nil))
  }

  /// Tells the VMM what happened. May be called from any thread, also from `onFailure` of
  /// a session.
  ///
  /// - Returns: whether the VMM can get it. If it does not read, or is gone, messages are
  ///   counted and dropped.
  @discardableResult
  public func push(_ status: HandoverStatus) -> Bool { send(.status(status)) }

  @discardableResult
  private func send(_ message: ServiceMessage) -> Bool {
    // The lock keeps frames of several threads apart.
    outbox.withLock { outbox in
      guard flush(&outbox) else {
        outbox.dropped += 1
        return false
      }
      var message = message
      if case .status(var status) = message {
        status.dropped = outbox.dropped
        message = .status(status)
      }
      guard let frame = try? message.frame(), let sent = try? socket.sendWithoutWaiting(frame),
        sent > 0
      else {
        outbox.dropped += 1
        return false
      }
      outbox.rest = Array(frame[sent...])
      outbox.dropped = 0
      return true
    }
  }

  /// Sends the rest of an earlier frame; whether it is out.
  private func flush(_ outbox: inout Outbox) -> Bool {
    guard !outbox.rest.isEmpty else { return true }
    guard let sent = try? socket.sendWithoutWaiting(outbox.rest) else { return false }
    outbox.rest.removeFirst(sent)
    return outbox.rest.isEmpty
  }

  // MARK: - The end

  /// Whether the VMM has closed; never waits. What it sent after its request is not read.
  ///
  /// Wait for it by watching `socket` for EPOLLRDHUP.
  public func hasClosed() -> Bool { socket.isHungUp }
}
