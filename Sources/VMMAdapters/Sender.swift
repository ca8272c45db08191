// SPDX-License-Identifier: Apache-2.0

internal import HandoverProtocol
internal import LinuxSystem
internal import SystemPackage

/// Who hands over, and whether it may.
struct Sender {
  let credentials: PeerCredentials

  init(_ socket: borrowing UnixSocket, allowedUsers: Set<UInt32>?) throws(HandoverError) {
    do throws(Errno) {
      credentials = try socket.peer
    } catch {
      throw HandoverError(.inputOutput, "the kernel does not say who connected", errno: error)
    }
    if let allowedUsers, !allowedUsers.contains(credentials.userID) {
      throw HandoverError(
        .notAllowed, "user \(credentials.userID) may not hand over memory here", peer: credentials)
    }
  }

  /// A pidfd of it.
  func openProcess(_ socket: borrowing UnixSocket) throws(HandoverError) -> OwnedDescriptor {
    do throws(Errno) {
      return try socket.openPeerProcess()
    } catch {
      throw HandoverError(
        error == .noSuchProcess ? .disconnected : .inputOutput,
        "its process cannot be watched (pidfd)", errno: error)
    }
  }
}

extension HandoverLimits {
  /// When a message that begins now has to be complete, on `MonotonicClock.nanoseconds`.
  var deadline: UInt64 {
    MonotonicClock.nanoseconds + UInt64(timeoutMilliseconds) * 1_000_000
  }
}

extension UnixSocket {
  /// The next bytes of a hand-over; none when the peer has closed.
  borrowing func receiveHandover(
    limit: Int, into descriptors: inout DescriptorList, descriptorLimit: Int, deadline: UInt64,
    stopSign: CInt
  ) throws(HandoverError) -> [UInt8] {
    do throws(Errno) {
      return try receive(
        limit: limit, into: &descriptors, descriptorLimit: descriptorLimit, before: deadline,
        stopSign: stopSign)
    } catch {
      switch error {
      case .timedOut:
        throw HandoverError(.timedOut, "its message was not complete in time")
      case .canceled:
        throw HandoverError(.cancelled, "the service stops")
      case .connectionReset:
        throw HandoverError(.disconnected, "it closed the connection", errno: error)
      case .messageTooLong:
        throw HandoverError(
          .invalidDescriptor,
          "it sent more than \(descriptorLimit) descriptors, or this process may not open so many")
      default:
        throw HandoverError(.inputOutput, "nothing can be received", errno: error)
      }
    }
  }
}

// MARK: - Errors

extension HandoverError {
  /// The same error with the one who caused it.
  func from(_ peer: PeerCredentials) -> Self {
    var error = self
    error.peer = peer
    return error
  }

  /// What is wrong with a message.
  init(_ error: ProtocolError) {
    let code: Code =
      switch error.code {
      case .tooLong: .limitExceeded
      case .unsupportedVersion: .unsupportedVersion
      default: .malformed
      }
    self.init(code, error.description, region: error.region)
  }
}
