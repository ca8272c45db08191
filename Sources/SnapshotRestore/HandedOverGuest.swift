// SPDX-License-Identifier: Apache-2.0

public import GuestMemory
internal import HandoverClient
internal import HandoverProtocol
internal import LinuxSystem
public import MemoryImage
public import Pager
public import Snapshot
internal import Synchronization
public import SystemPackage
public import TestGuest
internal import Userfault

/// How to restore a guest whose memory a service serves (docs/handover.md).
public struct HandoverOptions: Sendable {
  /// The service's socket.
  public var socket: FilePath
  /// What the guest's memory is made of; pages of 4 KiB or 2 MiB.
  public var backing = MemoryBacking.anonymous
  /// How the service fills absent pages; `.minor` needs a memory file.
  public var mode = ResolutionMode.missing
  /// Makes the guest a clone: its clean pages are those of the service, in pages of the size of
  /// `backing`, and what it writes is its own. `mode` does not count then.
  public var isClone = false
  /// The guest's name for the service's logs and lists.
  public var name: String?
  /// The image to ask the service for, where it has several.
  public var serviceImage: String?
  /// Called from a thread of its own with what the service tells: a page without right content,
  /// for one.
  public var onNotice: (@Sendable (String) -> Void)?
  /// Called once, from that thread, when nobody serves the memory any more while the guest runs.
  /// Its vCPUs wait at pages that are missing, and nothing but the end of this process wakes them.
  public var onEnd: (@Sendable (String) -> Void)?

  /// Options for anonymous memory.
  public init(socket: FilePath) { self.socket = socket }
}

/// A test guest that runs again from an image, with its memory served by another process: an
/// example of a VMM that uses `HandoverClient`.
///
/// The vCPUs are those of the image; the content of memory is what the service has. There is no
/// pager in this process, only the userfaultfd.
public final class HandedOverGuest: RunningGuest {
  /// The image that it came from.
  public let image: MemoryImage
  /// The guest, running.
  public let guest: TestGuest
  /// Its memory.
  public let memory: GuestMemoryHandle
  /// The service's name for the session.
  public var session: String { watch.client.session }
  /// From the beginning of the restore to the guest's creation: CLOCK_MONOTONIC nanoseconds.
  public let preparationNanoseconds: UInt64
  /// When the restore began: CLOCK_MONOTONIC nanoseconds.
  public let startNanoseconds: UInt64
  /// Stays open: if the service's were the last one, absent pages would become zeros with it.
  private let userfault: UserfaultHandle
  private let watch: HandoverWatch
  private let thread: Mutex<NamedThread?>

  /// Opens an image, hands memory over and lets the guest run.
  public init(_ path: FilePath, _ options: HandoverOptions) throws(SnapshotError) {
    startNanoseconds = MonotonicClock.nanoseconds
    let saved = try SavedGuest(path, backing: options.backing)
    image = saved.image
    let client: HandoverClient
    (memory, userfault, client) =
      options.isClone
      ? try Self.openAndAttach(saved, options) : try Self.attach(saved, options)
    watch = try HandoverWatch(
      client, memory.range.start, saved.image.regions[0].guestAddress, options)
    preparationNanoseconds = MonotonicClock.nanoseconds - startNanoseconds
    do throws(Errno) {
      thread = Mutex(try NamedThread(name: "handover") { [watch] in watch.run() })
    } catch {
      throw SnapshotError(.pager, "no thread for what the service tells: \(error)")
    }
    do throws(SnapshotError) {
      guest = try saved.run(in: memory)
    } catch {
      Self.end(watch, thread, userfault)
      throw error
    }
  }

  deinit { shutdown() }

  /// Ends the guest while the service serves, then takes the memory back. Safe to call again.
  public func shutdown() {
    guest.shutdown()
    Self.end(watch, thread, userfault)
  }

  /// How many pages have no right content, and the first 64 of them in words.
  public var failures: (count: Int, descriptions: [String]) { watch.failures }

  /// Waits until the service has told why the guest was stopped, where a page was the reason.
  public func awaitFailure() { watch.awaitFailure() }

  // MARK: - Parts

  /// What it takes to be served: the memory, what watches it, and the session.
  private typealias Parts = (GuestMemoryHandle, UserfaultHandle, HandoverClient)

  private static func attach(
    _ saved: SavedGuest, _ options: HandoverOptions
  ) throws(SnapshotError) -> Parts {
    let memory = GuestMemoryHandle(try saved.makeMemory(options.backing))
    let userfault = try UserfaultHandle(watching: memory, options.mode)
    var region = AttachMessage.Region(
      hostAddress: memory.range.start.rawValue, length: UInt64(memory.range.length),
      pageSize: UInt64(memory.backing.pageSize.bytes),
      guestAddress: saved.image.regions[0].guestAddress.rawValue)
    var files: [CInt] = []
    if options.mode == .minor {
      region.mode = .minor
      region.memory = 0
      switch memory.object.file {
      case .none: throw SnapshotError(.memory, "\(memory.backing) memory has no minor faults")
      case .some(let file):
        do throws(Errno) {
          // The service insists on it: a file that shrinks would be its end.
          try file.seal(futureWrites: false)
        } catch {
          throw SnapshotError(.memory, "the memory file cannot be sealed: \(error)")
        }
        files = [file.descriptor.rawValue]
      }
    }
    do throws(HandoverClientError) {
      let client = try HandoverClient(
        attachingTo: options.socket, regions: [region], userfaultfd: userfault.userfaultfd,
        memoryFiles: files, name: options.name, image: options.serviceImage)
      return (memory, userfault, client)
    } catch {
      throw SnapshotError(.pager, error.description)
    }
  }

  /// A clone gets its memory from the service, then hands its mapping of it over.
  private static func openAndAttach(
    _ saved: SavedGuest, _ options: HandoverOptions
  ) throws(SnapshotError) -> Parts {
    let opened: OpenedImage
    do throws(HandoverClientError) {
      opened = try OpenedImage(
        from: options.socket, image: options.serviceImage, name: options.name,
        pageSize: options.backing.pageSize)
    } catch {
      throw SnapshotError(.pager, error.description)
    }
    guard opened.regions.count == 1, let region = opened.regions.first,
      region.length == saved.length
    else {
      throw SnapshotError(.image, "the service's image is not that of \(saved.image.path)")
    }
    let memory = GuestMemoryHandle(try saved.makeClone(of: region))
    let userfault = try UserfaultHandle(watching: memory, .minor)
    do throws(HandoverClientError) {
      let client = try opened.attach(
        [region.attached(at: memory.range.start)], userfaultfd: userfault.userfaultfd)
      return (memory, userfault, client)
    } catch {
      throw SnapshotError(.pager, error.description)
    }
  }

  private static func end(
    _ watch: HandoverWatch, _ thread: borrowing Mutex<NamedThread?>, _ userfault: UserfaultHandle
  ) {
    watch.stop()
    let thread = thread.withLock { $0.take() }
    if let thread { thread.join() }
    userfault.unregister()
  }
}

/// The userfaultfd of some memory, which it keeps: unmapping memory that is watched would wait for
/// somebody to read of it.
private final class UserfaultHandle: Sendable {
  let userfaultfd: Userfaultfd
  private let memory: GuestMemoryHandle

  /// Makes one that watches memory.
  init(watching memory: GuestMemoryHandle, _ mode: ResolutionMode) throws(SnapshotError) {
    self.memory = memory
    do {
      userfaultfd = try Userfaultfd(wanting: PagerSession<ImageSource>.features.wanted)
      _ = try userfaultfd.register(
        memory.range, modes: mode == .minor ? [.missing, .minor] : .missing)
    } catch let error as Errno where error == .invalidArgument && mode == .minor {
      throw SnapshotError(
        .memory, "\(memory.backing) memory has no minor faults; use memfd or hugetlb memory")
    } catch {
      throw SnapshotError(.pager, "userfaultfd refuses the guest's memory: \(error)")
    }
  }

  deinit { unregister() }

  /// Watches it no more: absent pages are zeros from here on. Safe to call again.
  func unregister() {
    // EINVAL, ENOENT: it is not watched any more.
    try? userfaultfd.unregister(memory.range)
  }
}
