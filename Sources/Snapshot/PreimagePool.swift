// SPDX-License-Identifier: Apache-2.0

internal import GuestMemory
internal import LinuxSystem
internal import MemoryImage
internal import Synchronization
internal import SystemPackage

/// Up to 512 pages (2 MiB) with their numbers, collected to be written together.
///
/// Has one user at a time.
final class PageBatch: @unchecked Sendable {
  // SAFETY: whoever has it out of a pool is its only user until it goes back.

  /// Pages that it has room for.
  static let capacity = 512

  private let room: Mapping
  /// The numbers of its pages, among all that are tracked.
  private(set) var pages: [Int] = []

  init() throws(Errno) {
    room = try Mapping(anonymous: Self.capacity * ImageLimits.blockSize)
    pages.reserveCapacity(Self.capacity)
  }

  var isFull: Bool { pages.count == Self.capacity }

  /// Adds copies of pages that follow each other; they fit. Allocates nothing.
  ///
  /// - Returns: how many were added: less than asked for when the next one cannot be read.
  func append(_ run: Range<Int>, from address: HostAddress) throws(Errno) -> Int {
    precondition(run.count <= Self.capacity - pages.count)
    // SAFETY: there is room for that many pages.
    let room = unsafe UnsafeMutableRawBufferPointer(
      start: room.pointer + pages.count * ImageLimits.blockSize,
      count: run.count * ImageLimits.blockSize)
    let count = try unsafe GuardedCopy.read(from: address, into: room) / ImageLimits.blockSize
    for page in run.prefix(count) { pages.append(page) }
    return count
  }

  /// Keeps those pages from a place on that a body wants.
  func keep(from start: Int, _ isWanted: (Int) -> Bool) {
    var kept = start
    for index in start..<pages.count where isWanted(pages[index]) {
      if kept < index {
        // SAFETY: both are pages of the room.
        unsafe (room.pointer + kept * ImageLimits.blockSize).copyMemory(
          from: room.pointer + index * ImageLimits.blockSize, byteCount: ImageLimits.blockSize)
        pages[kept] = pages[index]
      }
      kept += 1
    }
    pages.removeLast(pages.count - kept)
  }

  func removeAll() { pages.removeAll(keepingCapacity: true) }

  /// The content of its pages from one to another.
  @unsafe func bytes(_ range: Range<Int>) -> UnsafeRawBufferPointer {
    precondition(range.upperBound <= pages.count)
    return unsafe UnsafeRawBufferPointer(
      start: room.pointer + range.lowerBound * ImageLimits.blockSize,
      count: range.count * ImageLimits.blockSize)
  }
}

/// Pages as they were at the pause, on their way from the thread that lets the guest write to
/// those that write the image.
///
/// The memory is bounded: when all batches are full, the guest's writes wait for the disk. It
/// must never wait for ever, so `fail` lets everything through.
final class PreimagePool: Sendable {
  private struct State {
    var free: [PageBatch]
    var full: [PageBatch] = []
    /// The batch that the tracker's thread fills; only it looks into it.
    var current: PageBatch?
    var hasFailed = false
    /// The page that could not be copied.
    var unreadable: Int?
    var stalls = 0
  }

  private let state: Monitor<State>
  private let count = Atomic<Int>(0)

  init(batches: Int) throws(Errno) {
    var free: [PageBatch] = []
    for _ in 0..<batches { free.append(try PageBatch()) }
    var full: [PageBatch] = []
    full.reserveCapacity(batches)
    state = Monitor(State(free: free, full: full))
  }

  /// A page that could not be copied: then the snapshot is of no use.
  var unreadable: Int? { state.withLock { $0.unreadable } }
  /// Pages that were copied.
  var pageCount: Int { count.load(ordering: .relaxed) }
  /// How often there was no room.
  var stalls: Int { state.withLock { $0.stalls } }

  // MARK: - The tracker's thread

  /// Copies a page; waits for room. Only from one thread. Allocates nothing.
  func add(page: Int, from address: HostAddress) {
    guard let batch = batchWithRoom() else { return }
    if (try? batch.append(page..<page + 1, from: address)) == 1 {
      count.wrappingAdd(1, ordering: .relaxed)
    } else {
      state.withLock { $0.unreadable = $0.unreadable ?? page }
    }
  }

  private func batchWithRoom() -> PageBatch? {
    var hasStalled = false
    return state.wait { state -> PageBatch?? in
      if state.hasFailed { return .some(nil) }
      if let current = state.current, !current.isFull { return current }
      if let full = state.current.take() { state.full.append(full) }
      guard let next = state.free.popLast() else {
        if !hasStalled { state.stalls += 1 }
        hasStalled = true
        return nil
      }
      state.current = next
      return next
    }
  }

  /// From now on pages are dropped, and nobody waits.
  func fail() { state.withLock { $0.hasFailed = true } }

  // MARK: - Threads that write the image

  /// A batch to be written, if there is one; goes back by `recycle`.
  func takeFull() -> PageBatch? { state.withLock { $0.full.popLast() } }

  /// The last batch; when no page will be added any more.
  func takeRest() -> PageBatch? {
    state.withLock { state in
      state.full.popLast() ?? state.current.take()
    }
  }

  func recycle(_ batch: PageBatch) {
    batch.removeAll()
    state.withLock { $0.free.append(batch) }
  }
}
