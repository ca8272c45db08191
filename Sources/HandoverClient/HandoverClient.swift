// SPDX-License-Identifier: Apache-2.0

public import HandoverProtocol
internal import LinuxSystem
internal import Synchronization
public import SystemPackage
public import Userfault

/// A VMM's end of a hand-over by docs/handover.md. It is the lifetime of the session: the
/// service stops serving when this goes away. For a clone see `OpenedImage`.
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
  public convenience init(
    attachingTo path: FilePath, regions: [AttachMessage.Region],
    userfaultfd: borrowing Userfaultfd, memoryFiles: [CInt] = [], name: String? = nil,
    image: String? = nil, options: AttachMessage.Options? = nil, timeoutMilliseconds: Int = 10_000
  ) throws(HandoverClientError) {
    let frame = try Self.frame(
      AttachMessage(
        regions: regions, name: name, image: image, memoryFiles: memoryFiles.count,
        options: options))
    try self.init(
      try ServiceConnection(to: path), frame,
      descriptors: [userfaultfd.descriptor.rawValue] + memoryFiles,
      timeoutMilliseconds: timeoutMilliseconds)
  }

  /// Sends `attach` on a connection and waits for the answer.
  init(
    _ connection: consuming ServiceConnection, _ attach: [UInt8], descriptors: [CInt],
    timeoutMilliseconds: Int
  ) throws(HandoverClientError) {
    var connection = connection
    var unwanted = DescriptorList()
    switch try connection.request(
      attach, descriptors: descriptors, into: &unwanted, timeoutMilliseconds: timeoutMilliseconds)
    {
    case .ok(let session): self.session = session
    case .error(let code, let message, _):
      throw HandoverClientError(.refused, message, serviceCode: code)
    case .status, .image:
      throw HandoverClientError(.badAnswer, "something else came before the answer")
    }
    received = Mutex(connection.assembler)
    socket = connection.takeSocket()
  }

  /// The frame of a request that can be sent.
  static func frame(_ message: AttachMessage) throws(HandoverClientError) -> [UInt8] {
    guard message.descriptors.count <= HandoverFrame.descriptorLimit else {
      throw HandoverClientError(
        .invalidRequest, "more than \(HandoverFrame.descriptorLimit) descriptors")
    }
    do throws(ProtocolError) {
      return try message.frame()
    } catch {
      throw HandoverClientError(.invalidRequest, error.description)
    }
  }

  /// The next thing that the service tells; `nil` when nothing came in time.
  ///
  /// Throws `.closed` when the service is gone, and `.badAnswer`.
  /// - Parameter milliseconds: how long to wait; 0 for what is there already.
  public func nextStatus(
    waitingMilliseconds milliseconds: Int = 0
  ) throws(HandoverClientError) -> HandoverStatus? {
    let deadline = ServiceConnection.deadline(milliseconds: milliseconds)
    do throws(HandoverClientError) {
      let message = try received.withLock { (assembler) throws(HandoverClientError) in
        var unwanted = DescriptorList()
        return try ServiceConnection.next(
          from: socket, &assembler, into: &unwanted, limit: HandoverFrame.descriptorLimit,
          before: deadline)
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
}
