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
