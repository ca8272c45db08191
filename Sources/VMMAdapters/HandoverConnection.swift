// SPDX-License-Identifier: Apache-2.0

public import HandoverProtocol
public import LinuxSystem
internal import Synchronization
internal import SystemPackage

/// The service's end of a hand-over by docs/handover.md: `receive`, which also answers `open`,
/// then `accept` or `refuse`, then `push`. It is the lifetime of the session on both sides.
///
/// Sending never waits for the VMM.
public final class HandoverConnection: Sendable {
  /// The connection, for waiting until the VMM has gone (`hasClosed`).
  public let socket: UnixSocket
  private let outbox = Mutex(Outbox())

  /// What did not fit into the socket's buffer.
  private struct Outbox {
    /// The rest of a frame whose beginning was sent.
    var rest: [UInt8] = []
    /// Status messages that were lost since the last one that was sent.
    var dropped = 0
  }

  /// Takes over a connection that was accepted.
  public init(_ socket: consuming UnixSocket) { self.socket = socket }

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
    limits: HandoverLimits = HandoverLimits(), allowedUsers: Set<UInt32>? = nil,
    stopSign: CInt = -1,
    open: ((OpenRequest) throws(HandoverError) -> ImageOffer)? = nil
  ) throws(HandoverError) -> HandoverRequest {
    var peer: PeerCredentials?
    do throws(HandoverError) {
      let deadline = limits.deadline
      let sender = try Sender(socket, allowedUsers: allowedUsers)
      peer = sender.credentials
      let process = try sender.openProcess(socket)
      var assembler = FrameAssembler(payloadLimit: limits.messageBytes)
      var opened: (request: OpenRequest, offer: ImageOffer)?
      // Two messages may come in one piece: whatever comes is for `attach`.
      var descriptors = DescriptorList()
      while true {
        switch try nextMessage(&assembler, into: &descriptors, before: deadline, stopSign) {
        case .attach(let message):
          return try HandoverRequest(
            message, descriptors, limits: limits, peer: sender.credentials, process: process,
            opened: opened)
        case .open(let message):
          guard let open else {
            throw HandoverError(.unsupported, "there are no clones here")
          }
          guard opened == nil else { throw HandoverError(.malformed, "\"open\" came twice") }
          let request = try OpenRequest(message, peer: sender.credentials)
          let offer = try open(request)
          try send(offer)
          opened = (request, offer)
        }
      }
    } catch {
      let complete = peer.map { error.from($0) } ?? error
      refuse(complete)
      throw complete
    }
  }

  private func nextMessage(
    _ assembler: inout FrameAssembler, into descriptors: inout DescriptorList,
    before deadline: UInt64, _ stopSign: CInt
  ) throws(HandoverError) -> VMMMessage {
    while true {
      do throws(ProtocolError) {
        // What follows `attach` is dropped, as it would be if it came later.
        if let payload = try assembler.next() { return try VMMMessage(decoding: payload) }
      } catch {
        throw HandoverError(error)
      }
      let piece = try socket.receiveHandover(
        limit: 16 << 10, into: &descriptors, descriptorLimit: HandoverFrame.descriptorLimit,
        deadline: deadline, stopSign: stopSign)
      guard !piece.isEmpty else {
        throw HandoverError(
          .disconnected, "it ended after \(assembler.pendingBytes) bytes of its message")
      }
      assembler.append(piece)
    }
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

  /// Whether the VMM has closed. Reads and drops what it sent; never waits.
  ///
  /// Wait for it by watching `socket`, which can be read then.
  public func hasClosed() -> Bool {
    while true {
      do throws(Errno) {
        guard try socket.isReadable else { return false }
        let message = try socket.receive(limit: 4096)
        var unwanted = DescriptorList()
        unwanted.append(owning: message.descriptors)
        if message.bytes.isEmpty { return true }
      } catch {
        // Too many descriptors: they are closed, and the rest is read.
        guard error == .messageTooLong else { return true }
      }
    }
  }
}
