// SPDX-License-Identifier: Apache-2.0

internal import DaemonConfiguration
internal import LinuxSystem
internal import Logging
internal import MemoryImage
internal import Synchronization
internal import SystemPackage
internal import VMMAdapters

/// A VMM that has connected, and has not said all yet.
final class ArrivingVMM: WaitingClient {
  /// What it was offered as a clone.
  typealias Opened = (image: MemoryImage, cache: ImageCache)

  let descriptor: CInt
  let user: UInt32
  private let isAllowed: Bool
  private let registry: SessionRegistry
  /// Taken out by the thread that goes on with it: closing waits for whatever a VMM has sent.
  private let connection: Mutex<HandoverConnection?>
  /// By the one thread that goes on with it.
  let opened = Mutex<Opened?>(nil)

  init(
    _ socket: consuming UnixSocket, _ configuration: ListenConfiguration,
    _ registry: SessionRegistry
  ) {
    descriptor = socket.descriptor.rawValue
    let user = try? socket.peer.userID
    self.user = user ?? 0
    isAllowed = user.map { configuration.allowedUsers?.contains($0) ?? true } ?? false
    self.registry = registry
    let connection = HandoverConnection(
      socket, framing: configuration.handover == .firecracker ? .array : .frames)
    self.connection = Mutex(connection)
  }

  var descriptorCount: Int { connection.withLock { $0?.descriptorCount ?? 0 } }

  // One that may not is told so at once.
  func collect() -> Bool { connection.withLock { !isAllowed || $0?.collect() ?? true } }

  func takeConnection() -> HandoverConnection? { connection.withLock { $0.take() } }
  func giveBack(_ connection: HandoverConnection) { self.connection.withLock { $0 = connection } }
  func close() { _ = takeConnection() }

  func reject(_ rejection: Rejection) {
    guard let connection = connection.withLock({ $0 }) else { return }
    let code: HandoverError.Code =
      switch rejection {
      case .timedOut: .timedOut
      case .crowded, .noDescriptor, .noThread: .busy
      case .stopping: .cancelled
      }
    // It had an image, and left or says nothing more.
    let isOpened = opened.withLock { $0 != nil }
    registry.noteHandover(isOpened && rejection == .timedOut ? "opened" : code.name)
    connection.refuse(HandoverError(code, rejection.reason))
    connection.hangUp()
  }
}

/// A socket on which VMMs hand over.
final class VMMListener: Sendable {
  private let reception: Reception<ArrivingVMM>
  /// The file, if it is ours to remove.
  private let path: Mutex<SocketPath?>

  /// Listens. A socket that nobody answers on any more is replaced; throws where somebody does.
  ///
  /// - Parameter inherited: a socket that listens already, or -1.
  init(
    _ configuration: ListenConfiguration, inherited: CInt, _ threads: DaemonThreads,
    _ attachment: Attachment, _ registry: SessionRegistry, log: Logger
  ) throws {
    let listener: UnixListener
    if inherited >= 0 {
      path = Mutex(nil)
      listener = UnixListener(owning: OwnedDescriptor(owning: inherited))
    } else {
      let path = try SocketPath(configuration.socket)
      listener = try path.listen(mode: configuration.mode)
      self.path = Mutex(path)
    }
    reception = try Reception(
      listener, name: configuration.socket,
      limits: .init(places: Limits.places(1024)), workers: threads.handovers,
      closers: threads.closers, log: log,
      make: { ArrivingVMM($0, configuration, registry) },
      handle: { attachment.handle($0, configuration) })
  }

  /// Starts to accept.
  func start() throws(Errno) { try reception.start() }

  /// Accepts no more, sends away who waits, and removes the socket. Waits some time for the
  /// hand-overs that are under way.
  func stop(milliseconds: UInt64) {
    reception.stop(milliseconds: milliseconds)
    path.withLock { $0 = nil }
  }
}
