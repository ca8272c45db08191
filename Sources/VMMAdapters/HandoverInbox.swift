// SPDX-License-Identifier: Apache-2.0

internal import HandoverProtocol
internal import LinuxSystem
internal import SystemPackage

/// How a VMM's messages are told from each other.
public enum HandoverFraming: Sendable {
  /// Frames of docs/handover.md.
  case frames
  /// One JSON array, as Firecracker sends it.
  case array
}

/// What a VMM has sent so far of its next message. Taking in what there is never waits, so one
/// thread can do it for any number of VMMs.
struct HandoverInbox: ~Copyable, Sendable {
  /// The next message, or why there is none.
  private enum Content: Sendable {
    case incomplete
    case message([UInt8])
    case failed(HandoverError)
  }

  /// Descriptors that came, with whichever message.
  var descriptors = DescriptorList()
  private let framing: HandoverFraming
  private let limits: HandoverLimits
  private var assembler: FrameAssembler
  private var array: [UInt8] = []
  private var extent = JSONExtent()
  private var content = Content.incomplete

  init(_ framing: HandoverFraming, _ limits: HandoverLimits) {
    self.framing = framing
    self.limits = limits
    assembler = FrameAssembler(payloadLimit: limits.messageBytes)
  }

  /// Whether `next` has an answer: a message, or why there is none.
  var isReady: Bool {
    if case .incomplete = content { false } else { true }
  }

  /// Takes once what there is. Nothing is taken while there is a message already.
  mutating func collect(from socket: borrowing UnixSocket) {
    guard !isReady else { return }
    do throws(HandoverError) {
      let room = framing == .array ? limits.messageBytes - array.count : .max
      guard room > 0 else {
        throw HandoverError(.limitExceeded, "its message passes \(limits.messageBytes) bytes")
      }
      guard let piece = try receive(min(room, 16 << 10), from: socket) else { return }
      guard !piece.isEmpty else { throw ended }
      switch framing {
      case .frames: assembler.append(piece)
      case .array: array += piece
      }
      try advance()
    } catch {
      content = .failed(error)
    }
  }

  /// The next message; `nil` when it is not complete.
  mutating func next() throws(HandoverError) -> [UInt8]? {
    switch content {
    case .incomplete: return nil
    case .failed(let error): throw error
    case .message(let bytes):
      content = .incomplete
      // Two messages may have come in one piece.
      if framing == .frames {
        do throws(HandoverError) { try advance() } catch { content = .failed(error) }
      }
      return bytes
    }
  }

  /// Gives up what came so far.
  mutating func takeDescriptors() -> DescriptorList {
    var taken = DescriptorList()
    swap(&taken, &descriptors)
    return taken
  }

  // MARK: - Pieces

  /// `nil` when nothing is there.
  private mutating func receive(
    _ limit: Int, from socket: borrowing UnixSocket
  ) throws(HandoverError) -> [UInt8]? {
    let allowed = framing == .array ? 1 : HandoverFrame.descriptorLimit
    do throws(Errno) {
      let piece = try socket.receiveWithoutWaiting(limit: limit, into: &descriptors)
      guard descriptors.count <= allowed else { throw .messageTooLong }
      return piece
    } catch {
      switch error {
      case .connectionReset:
        throw HandoverError(.disconnected, "it closed the connection", errno: error)
      case .messageTooLong:
        throw HandoverError(
          .invalidDescriptor,
          "it sent more than \(allowed) descriptors, or this process may not open so many")
      default:
        throw HandoverError(.inputOutput, "nothing can be received", errno: error)
      }
    }
  }

  private var ended: HandoverError {
    switch framing {
    case .frames:
      HandoverError(
        .disconnected, "it ended after \(assembler.pendingBytes) bytes of its message")
    case .array:
      HandoverError(
        .disconnected, "it ended after \(array.count) bytes, before its list was complete")
    }
  }

  private mutating func advance() throws(HandoverError) {
    switch framing {
    case .frames:
      do throws(ProtocolError) {
        if let payload = try assembler.next() { content = .message(payload) }
      } catch {
        throw HandoverError(error)
      }
    case .array:
      switch extent.scan(array) {
      case .incomplete: break
      case .impossible(let reason): throw HandoverError(.malformed, reason)
      case .ends(let end):
        guard array[end...].allSatisfy({ [0x20, 0x0a, 0x0d, 0x09].contains($0) }) else {
          throw HandoverError(
            .malformed, "\(array.count - end) more bytes follow the list of regions")
        }
        content = .message(Array(array[..<end]))
      }
    }
  }
}

extension UnixSocket {
  /// Waits until there is something to collect.
  borrowing func awaitHandover(
    before deadline: UInt64, stopSign: CInt
  ) throws(HandoverError) {
    do throws(Errno) {
      try waitUntilReadable(before: deadline, stopSign: stopSign)
    } catch {
      switch error {
      case .timedOut: throw HandoverError(.timedOut, "its message was not complete in time")
      case .canceled: throw HandoverError(.cancelled, "the service stops")
      default: throw HandoverError(.inputOutput, "nothing can be received", errno: error)
      }
    }
  }
}
