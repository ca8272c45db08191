// SPDX-License-Identifier: Apache-2.0

internal import LinuxSystem
internal import MemoryImage
internal import Synchronization
internal import SystemPackage

/// Images that are open: sessions on the same file share one, and with it its index. It is closed
/// with the last of them.
///
/// Opening a file may take for ever (a network's filesystem, FUSE). So a thread of its own does it, one
/// for each path at a time, and whoever asks waits for it no longer than a limit.
final class ImageRegistry: Sendable {
  typealias Found = (image: MemoryImage, identity: FileIdentity)

  /// Why there is no image yet, for which the image is not to blame.
  struct Unavailable: Error, CustomStringConvertible {
    let description: String
  }

  private struct Key: Hashable {
    let path: String
    let identity: FileIdentity
  }

  private struct Entry {
    /// Of the file when the image was opened: one that was written to since may hold another.
    let stamp: Stamp
    weak var image: MemoryImage?
  }

  /// What changes with a file's content.
  private struct Stamp: Hashable {
    let length, modified, changed: Int

    init(_ status: FileStatus) {
      (length, modified, changed) = (status.length, status.modified, status.changed)
    }
  }

  /// A file that is being opened, and who waits for it.
  private final class Opening: Sendable {
    let start = MonotonicClock.nanoseconds
    let waiting = Atomic<Int>(0)
    let result = Monitor<Result<Found, any Error>?>(nil)
  }

  /// How long a file may take.
  private static let timeLimit: UInt64 = 10_000_000_000
  /// Of those who wait for one that takes long only so many go on waiting after `shortLimit`.
  private static let waitingLimit = 8
  private static let shortLimit: UInt64 = 1_000_000_000

  private let entries = Mutex<[Key: Entry]>([:])
  private let openings = Mutex<[String: Opening]>([:])
  private let threads: Workers

  init(_ threads: Workers) { self.threads = threads }

  /// The image at a path, and which file that is. A file that replaced another one is another
  /// image, and one that was written to is opened anew.
  func image(at path: String) throws -> Found {
    let opening = try opening(of: path)
    let number = opening.waiting.wrappingAdd(1, ordering: .relaxed).oldValue
    defer { opening.waiting.wrappingSubtract(1, ordering: .relaxed) }
    let limit = number < Self.waitingLimit ? Self.timeLimit : Self.shortLimit
    guard let result = opening.result.wait(until: opening.start + limit, { $0 }) else {
      throw Self.late(opening)
    }
    return try result.get()
  }

  private func opening(of path: String) throws -> Opening {
    try openings.withLock { openings in
      if let found = openings[path] {
        let age = MonotonicClock.nanoseconds - found.start
        let isFull = found.waiting.load(ordering: .relaxed) >= Self.waitingLimit
        guard age < (isFull ? Self.shortLimit : Self.timeLimit) else { throw Self.late(found) }
        return found
      }
      let made = Opening()
      let isStarted = threads.tryRun { [self] in
        let result = Result { try open(path) }
        _ = self.openings.withLock { $0.removeValue(forKey: path) }
        made.result.withLock { $0 = result }
      }
      guard isStarted else { throw Unavailable(description: "no thread has time for opening it") }
      openings[path] = made
      return made
    }
  }

  private static func late(_ opening: Opening) -> Unavailable {
    let seconds = (MonotonicClock.nanoseconds - opening.start) / 1_000_000_000
    let others = opening.waiting.load(ordering: .relaxed)
    return Unavailable(
      description:
        "its storage does not answer: it is being opened for \(seconds) s, \(others) wait for it")
  }

  private func open(_ path: String) throws -> Found {
    // A pipe does not block this, and is no image.
    let status = try OwnedDescriptor(openingForReading: FilePath(path)).status
    guard status.isRegular else { throw DaemonError("it is no regular file") }
    // Of before it is opened: what is written in between is noticed by the next one who asks.
    let (key, stamp) = (Key(path: path, identity: status.identity), Stamp(status))
    func found(_ entries: [Key: Entry]) -> MemoryImage? {
      entries[key].flatMap { $0.stamp == stamp ? $0.image : nil }
    }
    if let image = entries.withLock({ found($0) }) { return (image, key.identity) }
    let image = try MemoryImage(path: FilePath(path))
    return entries.withLock { entries in
      // Another thread may have been faster.
      if let image = found(entries) { return (image, key.identity) }
      entries = entries.filter { $0.value.image != nil }
      entries[key] = Entry(stamp: stamp, image: image)
      return (image, key.identity)
    }
  }

  /// Images that are open.
  var count: Int { entries.withLock { $0.values.count { $0.image != nil } } }
}
