// SPDX-License-Identifier: Apache-2.0

public import HandoverProtocol
public import LinuxSystem
internal import Synchronization
internal import SystemPackage

/// The service's end of a hand-over by docs/handover.md: `receive`, then `accept` or
/// `refuse`, then `push`. It is the lifetime of the session on both sides.
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
  public func receive(
    limits: HandoverLimits = HandoverLimits(), allowedUsers: Set<UInt32>? = nil,
    stopSign: CInt = -1
  ) throws(HandoverError) -> HandoverRequest {
    var peer: PeerCredentials?
    do throws(HandoverError) {
      let sender = try Sender(socket, allowedUsers: allowedUsers)
      peer = sender.credentials
      var descriptors = DescriptorList()
      let payload = try receiveFrame(into: &descriptors, limits: limits, stopSign: stopSign)
      let message: AttachMessage
      do throws(ProtocolError) {
        message = try AttachMessage(decoding: payload)
      } catch {
        throw HandoverError(error)
      }
      return try HandoverRequest(
        message, descriptors, limits: limits, peer: sender.credentials,
        process: try sender.openProcess(socket))
    } catch {
      let complete = peer.map { error.from($0) } ?? error
      refuse(complete)
      throw complete
    }
  }

  private func receiveFrame(
    into descriptors: inout DescriptorList, limits: HandoverLimits, stopSign: CInt
  ) throws(HandoverError) -> [UInt8] {
    let deadline = limits.deadline
    var assembler = FrameAssembler(payloadLimit: limits.messageBytes)
    while true {
      let piece = try socket.receiveHandover(
        limit: 16 << 10, into: &descriptors, descriptorLimit: HandoverFrame.descriptorLimit,
        deadline: deadline, stopSign: stopSign)
      guard !piece.isEmpty else {
        throw HandoverError(
          .disconnected, "it ended after \(assembler.pendingBytes) bytes of its message")
      }
      assembler.append(piece)
      do throws(ProtocolError) {
        // What follows is dropped, as it would be if it came later.
        if let payload = try assembler.next() { return payload }
      } catch {
        throw HandoverError(error)
      }
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
