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

  /// Adds a copy of a page. Allocates nothing.
  @unsafe func append(page: Int, from source: UnsafeRawPointer) {
    precondition(pages.count < Self.capacity)
    // SAFETY: there is room for one more page; the caller vouches for the source.
    unsafe (room.pointer + pages.count * ImageLimits.blockSize).copyMemory(
      from: source, byteCount: ImageLimits.blockSize)
    pages.append(page)
  }

  /// Takes the last pages away again.
  func removeLast(_ count: Int) { pages.removeLast(count) }

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

  /// Pages that were copied.
  var pageCount: Int { count.load(ordering: .relaxed) }
  /// How often there was no room.
  var stalls: Int { state.withLock { $0.stalls } }

  // MARK: - The tracker's thread

  /// Copies a page; waits for room. Only from one thread. Allocates nothing.
  @unsafe func add(page: Int, from source: UnsafeRawPointer) {
    guard let batch = batchWithRoom() else { return }
    // SAFETY: the caller vouches for the page.
    unsafe batch.append(page: page, from: source)
    count.wrappingAdd(1, ordering: .relaxed)
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
