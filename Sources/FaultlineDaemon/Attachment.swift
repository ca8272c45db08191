// SPDX-License-Identifier: Apache-2.0

internal import DaemonConfiguration
internal import Foundation
internal import GuestMemory
internal import LinuxSystem
internal import Logging
internal import MemoryImage
internal import Pager
internal import Synchronization
internal import SystemPackage
internal import Userfault
internal import VMMAdapters

/// Makes sessions of VMMs that hand over.
final class Attachment: Sendable {
  private let registry: SessionRegistry
  private let images: ImageRegistry
  private let caches: ImageCaches
  private let supervisor: Supervisor
  private let pool: PagerPool
  private let log: Logger

  init(
    _ registry: SessionRegistry, _ images: ImageRegistry, _ caches: ImageCaches,
    _ supervisor: Supervisor, _ pool: PagerPool, log: Logger
  ) {
    self.registry = registry
    self.images = images
    self.caches = caches
    self.supervisor = supervisor
    self.pool = pool
    self.log = log
  }

  /// Takes what one VMM has handed over, and begins to serve it, or says why not.
  func handle(
    _ client: ArrivingVMM, _ configuration: ListenConfiguration
  ) -> Reception<ArrivingVMM>.Outcome {
    guard let connection = client.takeConnection() else { return .done }
    do throws(HandoverError) {
      try checkDescriptors(of: connection)
      switch configuration.handover {
      case .firecracker: try attachFirecracker(connection, configuration)
      case .faultline:
        guard try attachFaultline(connection, client, configuration) else {
          client.giveBack(connection)
          return .waitsAgain
        }
      }
      registry.noteHandover("accepted")
    } catch {
      guard error.code != .disconnected || client.opened.withLock({ $0 == nil }) else {
        // It had the image, and left.
        registry.noteHandover("opened")
        return .done
      }
      registry.noteHandover(error.code.name)
      // Its lines are counted as that user's.
      log.warning(
        "\(error)",
        metadata: ["socket": "\(configuration.socket)", "uid": "\(client.user)"])
      // Whatever is left of what it sent is closed elsewhere.
      connection.hangUp()
      client.giveBack(connection)
    }
    return .done
  }

  /// Refuses what nobody hands over, before anything looks at it: a socket or a file of a filesystem
  /// that does not answer can hold up who closes it, and who asks for its state.
  private func checkDescriptors(of connection: HandoverConnection) throws(HandoverError) {
    guard connection.hasForeignDescriptors else { return }
    let error = HandoverError(
      .invalidDescriptor, "a descriptor is neither a userfaultfd nor a memfd",
      peer: try? connection.socket.peer)
    connection.refuse(error)
    throw error
  }

  // MARK: - The two protocols

  private func attachFirecracker(
    _ connection: HandoverConnection, _ configuration: ListenConfiguration
  ) throws(HandoverError) {
    let taken = try FirecrackerHandover.take(
      from: connection, allowedUsers: configuration.allowedUsers)
    guard let handover = taken else {
      throw HandoverError(.inputOutput, "its message is not complete")
    }
    let identity = GuestIdentity(name: nil, handover: .firecracker, peer: handover.peer)
    let regions = handover.regions
    let image = try image(for: identity, asking: nil, configuration).image
    try serve(
      Guest(
        identity: identity, image: image, cache: nil, regions: regions, connection: nil,
        // Firecracker keeps its end open and says nothing more; so is ours.
        kept: connection),
      handover.userfaultfd, handover.process, configuration.sessions)
  }

  /// - Returns: `false` when the VMM has opened an image, and is to say more.
  private func attachFaultline(
    _ connection: HandoverConnection, _ client: ArrivingVMM, _ configuration: ListenConfiguration
  ) throws(HandoverError) -> Bool {
    let taken = try connection.take(allowedUsers: configuration.allowedUsers) {
      (request) throws(HandoverError) in
      let (found, offer) = try self.open(request, configuration)
      client.opened.withLock { $0 = found }
      return offer
    }
    guard let request = taken else { return false }
    do throws(HandoverError) {
      let opened = client.opened.withLock { $0 }
      let identity = GuestIdentity(
        name: request.name, handover: .faultline, peer: request.peer)
      var sessions = configuration.sessions
      sessions.record = request.record ?? sessions.record
      sessions.fillRate = request.fillRate ?? sessions.fillRate
      let image: MemoryImage
      if let opened {
        image = opened.image
      } else {
        image = try self.image(for: identity, asking: request.image, configuration).image
      }
      let regions = request.regions
      let memoryFiles = request.memoryFiles
      try serve(
        Guest(
          identity: identity, image: image, cache: opened?.cache, regions: regions,
          memoryFiles: memoryFiles, connection: connection, kept: connection),
        request.userfaultfd, request.process, sessions)
      return true
    } catch {
      connection.refuse(error)
      throw error
    }
  }

  /// What a VMM gets that wants to be a clone.
  private func open(
    _ request: OpenRequest, _ configuration: ListenConfiguration
  ) throws(HandoverError) -> ((image: MemoryImage, cache: ImageCache), ImageOffer) {
    let identity = GuestIdentity(name: request.name, handover: .faultline, peer: request.peer)
    let (image, file) = try image(for: identity, asking: request.image, configuration)
    var cache: ImageCache?
    let offer = try ImageOffer(regions: image.regions, pageSize: request.pageSize) {
      () throws(Errno) in
      let found = try caches.cache(of: image, identity: file, pageSize: request.pageSize)
      cache = found
      return found.regions
    }
    guard let cache else { throw HandoverError(.inputOutput, "there is no cache") }
    return ((image, cache), offer)
  }

  // MARK: - Steps

  private struct Guest {
    let identity: GuestIdentity
    let image: MemoryImage
    let cache: ImageCache?
    let regions: [HandedRegion]
    var memoryFiles: [HandedMemoryFile?] = []
    let connection: HandoverConnection?
    let kept: HandoverConnection
  }

  private func image(
    for identity: GuestIdentity, asking name: String?, _ configuration: ListenConfiguration
  ) throws(HandoverError) -> (image: MemoryImage, identity: FileIdentity) {
    let values = ImageTemplate.Values(
      image: name, name: identity.name, userID: identity.peer.userID,
      processID: identity.peer.processID)
    guard let path = configuration.image.path(for: values) else {
      throw HandoverError(
        .unknownImage,
        "the VMM did not say which image, or what it said is no plain file name "
          + "(\(configuration.image))", peer: identity.peer)
    }
    do {
      return try images.image(at: path)
    } catch let error as ImageRegistry.Unavailable {
      throw HandoverError(.busy, "image \(path): \(error)", peer: identity.peer)
    } catch {
      throw HandoverError(.unknownImage, "image \(path): \(error)", peer: identity.peer)
    }
  }

  private func serve(
    _ guest: Guest, _ userfaultfd: consuming Userfaultfd, _ process: consuming OwnedDescriptor,
    _ configuration: SessionConfiguration
  ) throws(HandoverError) {
    let ranges = try ContentMap.ranges(of: guest.regions, in: guest.image.regions)
    let regions = try pagedRegions(ranges, guest)
    try replaceSessions(of: guest)
    let isClone = ranges.contains { if case .clone = $0.mode { true } else { false } }
    if configuration.onDamage == .stopVMM { warnUnlessKillable(guest, process) }
    let box = SessionBox()
    let id = registry.makeID()
    var options = PagerOptions(
      faultThreads: 1, populateThreads: 1,
      onFailure: { [log] failure in
        log.error("\(failure)", metadata: ["session": "\(box.session?.id ?? "")"])
        box.session?.push(failure)
      },
      onEnd: { [supervisor] error in
        if let session = box.session { supervisor.end(session, "\(error)") }
      })
    options.name = id
    options.onFailuresOmitted = { [log] count in
      log.error(
        "\(count) more pages have no right content",
        metadata: ["session": "\(box.session?.id ?? "")"])
    }
    options.records = configuration.record
    options.sourceTimeout = UInt64(configuration.sourceTimeoutMilliseconds) * 1_000_000
    options.onDamage = Pager.DamagePolicy(configuration.onDamage)
    let session: GuestSession
    do throws(PagerError) {
      let pager = try PagerSession(
        userfaultfd: userfaultfd, regions: regions, source: ImageSource(guest.image),
        options: options, registers: false, process: process)
      session = GuestSession(
        id: id, identity: guest.identity, image: guest.image, pager: pager,
        cache: isClone ? guest.cache : nil, regions: ranges, connection: guest.connection,
        kept: guest.kept, log: log)
      box.fill(session)
      registry.add(session)
      try pager.start(in: pool)
    } catch {
      if let session = box.session { registry.remove(session) }
      box.fill(nil)
      throw HandoverError(
        error.code == .ended ? .disconnected : .busy, error.description,
        peer: guest.identity.peer, errno: error.errno)
    }
    announce(session, configuration)
  }

  /// A process that hands memory over at addresses where it had handed over other memory before has
  /// put this in its place: what served that serves it no more.
  private func replaceSessions(of guest: Guest) throws(HandoverError) {
    let process = guest.identity.peer.processID
    guard process > 0 else { return }
    let places = guest.regions.map(\.host)
    for old in registry.all where old.identity.peer.processID == process {
      guard let isReplaced = old.pager.forget(places) else {
        throw HandoverError(
          .busy, "session \(old.id) still has a thread at these addresses",
          peer: guest.identity.peer)
      }
      if isReplaced { supervisor.end(old, "its process handed over other memory at its addresses") }
    }
  }

  private func pagedRegions(
    _ ranges: [ContentRange], _ guest: Guest
  ) throws(HandoverError) -> [PagedRegion] {
    var regions: [PagedRegion] = []
    for range in ranges {
      func failure(
        _ code: HandoverError.Code, _ reason: String, _ errno: Errno? = nil
      ) -> HandoverError {
        HandoverError(
          code, reason, region: range.handedRegion, peer: guest.identity.peer, errno: errno)
      }
      do throws(Errno) {
        regions.append(
          try range.makePagedRegion(
            memoryFiles: guest.memoryFiles, caches: guest.cache?.regions ?? []))
      } catch .invalidArgument {
        throw failure(.invalidRegions, "it is not what was offered, or has no memory file")
      } catch {
        throw failure(.inputOutput, "no memory for its page states", error)
      }
    }
    return regions
  }

  /// Says at the start what would otherwise be found out when a page is damaged.
  private func warnUnlessKillable(_ guest: Guest, _ process: borrowing OwnedDescriptor) {
    do throws(Errno) {
      try checkKill(of: process)
    } catch .notPermitted {
      log.error(
        """
        on-damage stop-vmm: \(guest.identity.peer) may not be ended by this user, and would wait \
        for ever at a damaged page. Run both as one user, give the daemon CAP_KILL, or use poison.
        """)
    } catch {
      // It is gone, which the session finds out.
    }
  }

  private func announce(_ session: GuestSession, _ configuration: SessionConfiguration) {
    let name = session.identity.name.map { " \($0)," } ?? ""
    let kind = session.cache == nil ? "" : ", a clone"
    log.info(
      "session \(session.id) begins:\(name) \(session.identity.peer)\(kind)",
      metadata: [
        "session": "\(session.id)", "image": "\(session.image.path)",
        "bytes": "\(session.bytes)",
      ], source: Logger.lifeCycle)
    session.connection?.accept(session: session.id)
    do throws(Errno) {
      try supervisor.watch(session)
    } catch {
      log.warning("the connection of session \(session.id) cannot be watched: \(error)")
    }
    do {
      try session.startFill(rate: configuration.fillRate, replays: true)
    } catch {
      log.warning("session \(session.id) is not filled in the background: \(error)")
    }
    // It may have ended before it was in the list of those who are told.
    if session.pager.hasEnded { supervisor.end(session, "the guest's process is gone") }
  }
}

/// The session of callbacks that are made before it is. Empty again when the session ends would
/// be too early: callbacks come from its threads.
private final class SessionBox: Sendable {
  private struct Weak: Sendable { weak var session: GuestSession? }
  private let content = Mutex(Weak())
  var session: GuestSession? { content.withLock { $0.session } }
  func fill(_ session: GuestSession?) { content.withLock { $0.session = session } }
}

extension Pager.DamagePolicy {
  /// As the configuration says.
  init(_ policy: DamageResponse) {
    self =
      switch policy {
      case .wait: .wait
      case .stopVMM: .stopVMM
      case .poison: .poison
      }
  }
}
