// SPDX-License-Identifier: Apache-2.0

internal import HandoverProtocol
internal import LinuxSystem
internal import SystemPackage

/// The VMM's end of a connection to a service: frames out, messages in.
struct ServiceConnection: ~Copyable, Sendable {
  let socket: UnixSocket
  var assembler = FrameAssembler()

  /// Connects to a service.
  init(to path: FilePath) throws(HandoverClientError) {
    do throws(Errno) {
      socket = try UnixSocket(connectingTo: path)
    } catch {
      throw HandoverClientError(.unreachable, "cannot connect to \(path)", errno: error)
    }
  }

  /// The socket alone.
  consuming func takeSocket() -> UnixSocket { socket }

  /// Sends a request and waits for the answer; descriptors that come are added to a list.
  mutating func request(
    _ frame: [UInt8], descriptors: [CInt] = [], into received: inout DescriptorList,
    timeoutMilliseconds: Int
  ) throws(HandoverClientError) -> ServiceMessage {
    // A service that refuses early closes before it has read everything: its answer is
    // there nevertheless.
    var sendError: Errno?
    do throws(Errno) {
      try socket.send(frame, descriptors: descriptors)
    } catch {
      sendError = error
    }
    do throws(HandoverClientError) {
      return try Self.next(
        from: socket, &assembler, into: &received, limit: HandoverFrame.descriptorLimit,
        before: Self.deadline(milliseconds: timeoutMilliseconds))
    } catch {
      guard error.code == .closed else { throw error }
      throw HandoverClientError(
        .closed,
        "the service closed the connection without an answer, as one that speaks another protocol "
          + "does", errno: sendError ?? error.errno)
    }
  }

  /// When a wait that begins now ends.
  static func deadline(milliseconds: Int) -> UInt64 {
    MonotonicClock.nanoseconds + UInt64(min(max(0, milliseconds), 1 << 31)) * 1_000_000
  }

  /// Waits for the next message.
  ///
  /// - Parameter limit: descriptors that may come, together with those that are in the list.
  static func next(
    from socket: borrowing UnixSocket, _ assembler: inout FrameAssembler,
    into received: inout DescriptorList, limit: Int, before deadline: UInt64
  ) throws(HandoverClientError) -> ServiceMessage {
    while true {
      do throws(ProtocolError) {
        if let payload = try assembler.next() { return try ServiceMessage(decoding: payload) }
      } catch {
        throw HandoverClientError(.badAnswer, error.description)
      }
      do throws(Errno) {
        if try !socket.isReadable { try socket.waitUntilReadable(before: deadline) }
        let message = try socket.receive(limit: 16 << 10)
        received.append(owning: message.descriptors)
        guard !message.bytes.isEmpty else { throw .connectionReset }
        guard received.count <= limit else { throw .messageTooLong }
        assembler.append(message.bytes)
      } catch {
        switch error {
        case .timedOut: throw HandoverClientError(.timedOut, "the service says nothing")
        case .messageTooLong:
          throw HandoverClientError(.badAnswer, "the service sent too many descriptors")
        default: throw HandoverClientError(.closed, "the service is gone", errno: error)
        }
      }
    }
  }
}
