// SPDX-License-Identifier: Apache-2.0

public import HandoverProtocol
internal import LinuxSystem
internal import Synchronization
public import SystemPackage
public import Userfault

/// A VMM's end of a hand-over by docs/handover.md. It is the lifetime of the session: the
/// service stops serving when this goes away.
///
/// Register the memory first, then `attach`, then run the guest.
public final class HandoverClient: Sendable {
  /// The service's name for the session.
  public let session: String
  private let socket: UnixSocket
  private let received: Mutex<FrameAssembler>

  /// Connects to a service and hands memory over; returns when it is served.
  ///
  /// - Parameters:
  ///   - path: of the service's socket.
  ///   - regions: the memory, registered with `userfaultfd` as `mode` says.
  ///   - userfaultfd: of this process; the caller may keep it open.
  ///   - memoryFiles: what regions mean by `memory`; they stay the caller's.
  ///   - timeoutMilliseconds: for the answer.
  public init(
    attachingTo path: FilePath, regions: [AttachMessage.Region],
    userfaultfd: borrowing Userfaultfd, memoryFiles: [CInt] = [], name: String? = nil,
    image: String? = nil, options: AttachMessage.Options? = nil, timeoutMilliseconds: Int = 10_000
  ) throws(HandoverClientError) {
    let message = AttachMessage(
      regions: regions, name: name, image: image, memoryFiles: memoryFiles.count,
      options: options)
    let frame: [UInt8]
    do throws(ProtocolError) {
      frame = try message.frame()
    } catch {
      throw HandoverClientError(.invalidRequest, error.description)
    }
    guard memoryFiles.count < HandoverFrame.descriptorLimit else {
      throw HandoverClientError(
        .invalidRequest, "more than \(HandoverFrame.descriptorLimit) descriptors")
    }
    let socket: UnixSocket
    do throws(Errno) {
      socket = try UnixSocket(connectingTo: path)
    } catch {
      throw HandoverClientError(.unreachable, "cannot connect to \(path)", errno: error)
    }
    // A service that refuses early closes before it has read everything: its answer is
    // there nevertheless.
    let descriptors = [userfaultfd.descriptor.rawValue] + memoryFiles
    var sendError: Errno?
    do throws(Errno) {
      try socket.send(frame, descriptors: descriptors)
    } catch {
      sendError = error
    }
    var assembler = FrameAssembler()
    let deadline =
      MonotonicClock.nanoseconds + UInt64(min(max(0, timeoutMilliseconds), 1 << 31)) * 1_000_000
    let answer: ServiceMessage
    do throws(HandoverClientError) {
      answer = try Self.next(from: socket, &assembler, before: deadline)
    } catch {
      guard error.code == .closed else { throw error }
      throw HandoverClientError(
        .closed,
        "the service closed the connection without an answer, as one that speaks another protocol "
          + "does", errno: sendError ?? error.errno)
    }
    switch answer {
    case .ok(let session): self.session = session
    case .error(let code, let message, _):
      throw HandoverClientError(.refused, message, serviceCode: code)
    case .status:
      throw HandoverClientError(.badAnswer, "a status came before the answer")
    }
    self.socket = socket
    received = Mutex(assembler)
  }

  /// The next thing that the service tells; `nil` when nothing came in time.
  ///
  /// Throws `.closed` when the service is gone, and `.badAnswer`.
  /// - Parameter milliseconds: how long to wait; 0 for what is there already.
  public func nextStatus(
    waitingMilliseconds milliseconds: Int = 0
  ) throws(HandoverClientError) -> HandoverStatus? {
    let deadline =
      MonotonicClock.nanoseconds + UInt64(min(max(0, milliseconds), 1 << 31)) * 1_000_000
    do throws(HandoverClientError) {
      let message = try received.withLock { (assembler) throws(HandoverClientError) in
        try Self.next(from: socket, &assembler, before: deadline)
      }
      guard case .status(let status) = message else {
        throw HandoverClientError(.badAnswer, "a second answer came")
      }
      return status
    } catch {
      guard error.code == .timedOut else { throw error }
      return nil
    }
  }

  /// For waiting: it can be read when a status is there or the service is gone.
  public var descriptor: CInt { socket.descriptor.rawValue }

  // MARK: - Frames

  private static func next(
    from socket: borrowing UnixSocket, _ assembler: inout FrameAssembler, before deadline: UInt64
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
        var unwanted = DescriptorList()
        unwanted.append(owning: message.descriptors)
        guard !message.bytes.isEmpty else { throw .connectionReset }
        assembler.append(message.bytes)
      } catch {
        switch error {
        case .timedOut: throw HandoverClientError(.timedOut, "the service says nothing")
        case .messageTooLong:
          throw HandoverClientError(.badAnswer, "the service sent descriptors")
        default: throw HandoverClientError(.closed, "the service is gone", errno: error)
        }
      }
    }
  }
}
