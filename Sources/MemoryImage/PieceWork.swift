// SPDX-License-Identifier: Apache-2.0

internal import LinuxSystem
internal import Synchronization
public import SystemPackage

/// Work in numbered pieces, done by several threads, each taking the next one.
public struct PieceWork: Sendable {
  /// Pieces, from 0.
  public let pieces: Int
  /// Threads, the caller's among them.
  public let threads: Int

  /// Work of so many pieces.
  public init(pieces: Int, threads: Int) {
    self.pieces = pieces
    self.threads = threads
  }

  /// Bytes that a piece of memory has.
  public static let pieceLength = 4 << 20

  private final class Shared<Failure: Error>: Sendable {
    let next = Atomic<Int>(0)
    let failure = Mutex<Failure?>(nil)
  }

  /// Runs a body for each piece. After the first error no new piece is begun, and the error
  /// is thrown when all threads have ended.
  ///
  /// - Parameter name: of the threads; a number is added.
  public func run<Failure: Error>(
    name: String, _ body: @escaping @Sendable (_ piece: Int) throws(Failure) -> Void
  ) throws(Failure) {
    let shared = Shared<Failure>()
    let pieces = pieces
    let loop: @Sendable () -> Void = {
      while shared.failure.withLock({ $0 == nil }) {
        let piece = shared.next.wrappingAdd(1, ordering: .relaxed).oldValue
        guard piece < pieces else { return }
        do throws(Failure) {
          try body(piece)
        } catch {
          shared.failure.withLock { $0 = $0 ?? error }
        }
      }
    }
    // A thread that cannot be made is one less: the caller does all the work then.
    var helpers: [Helper] = []
    for index in 1..<max(1, min(threads, pieces)) {
      guard let thread = try? Helper(name: "\(name)\(index)", loop) else { break }
      helpers.append(thread)
    }
    loop()
    for helper in helpers { helper.join() }
    if let failure = shared.failure.withLock({ $0 }) { throw failure }
  }

  /// The same, with a buffer for each thread: pages that are touched for the first time cost
  /// as much as compressing some of them.
  ///
  /// - Parameters:
  ///   - bufferLength: bytes, a multiple of 4 KiB. Zeros at first, then what the last piece
  ///     left.
  ///   - noMemory: the error when a buffer cannot be had.
  @unsafe public func run<Failure: Error>(
    name: String, bufferLength: Int, noMemory: @escaping @Sendable (Errno) -> Failure,
    _ body:
      @escaping @Sendable (
        _ piece: Int, _ buffer: UnsafeMutableRawBufferPointer
      ) throws(Failure) -> Void
  ) throws(Failure) {
    let buffers = Mutex<[WorkBuffer]>([])
    try run(name: name) { (piece) throws(Failure) in
      let buffer: WorkBuffer
      if let free = buffers.withLock({ $0.popLast() }) {
        buffer = free
      } else {
        do throws(Errno) {
          buffer = try WorkBuffer(bufferLength)
        } catch {
          throw noMemory(error)
        }
      }
      defer { buffers.withLock { $0.append(buffer) } }
      // SAFETY: this thread alone has taken the buffer, which lives until it is back.
      try unsafe body(
        piece,
        UnsafeMutableRawBufferPointer(start: buffer.mapping.pointer, count: bufferLength))
    }
  }

  /// Memory behind a shared reference.
  private final class WorkBuffer: Sendable {
    let mapping: Mapping
    init(_ length: Int) throws(Errno) { mapping = try Mapping(anonymous: length) }
  }

  /// A thread behind a shared reference.
  private final class Helper: Sendable {
    private let thread: Mutex<NamedThread?>
    init(name: String, _ body: @escaping @Sendable () -> Void) throws(Errno) {
      thread = Mutex(try NamedThread(name: name, body))
    }
    func join() {
      let thread = thread.withLock { $0.take() }
      if let thread { thread.join() }
    }
  }
}

/// Counts bytes that several threads have done.
public final class ByteProgress: Sendable {
  private let done = Atomic<Int>(0)
  private let total: Int
  private let report: ImageProgress?

  /// Nothing is done yet.
  ///
  /// - Parameters:
  ///   - total: bytes in all.
  ///   - report: told of each `add`, on its thread.
  public init(total: Int, _ report: ImageProgress?) {
    self.total = total
    self.report = report
  }

  /// Adds bytes.
  public func add(_ bytes: Int) {
    report?(done.wrappingAdd(bytes, ordering: .relaxed).newValue, total)
  }
}
