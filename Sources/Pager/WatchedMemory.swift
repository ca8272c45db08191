// SPDX-License-Identifier: Apache-2.0

internal import LinuxSystem
internal import Synchronization
internal import Userfault

/// The memory of a session, at the addresses where it was when the session began: mremap(2)
/// moves ranges away from there, and this follows them.
///
/// Until something moves it costs nothing. All ranges and addresses are the first ones, unless
/// they are said to be the present ones.
final class WatchedMemory: Sendable {
  let userfaultfd: Userfaultfd

  /// A part that has not been cut since it was moved as a whole.
  private struct Piece {
    var range: HostRange
    /// Where it is now.
    var present: HostAddress
    var presentRange: HostRange { HostRange(start: present, length: range.length) }
  }

  private let hasMoved = Atomic<Bool>(false)
  /// All of the memory, once something has moved.
  private let pieces = Mutex<[Piece]>([])

  init(_ userfaultfd: consuming Userfaultfd) { self.userfaultfd = userfaultfd }

  /// The memory of a child that was forked just now: it lies where that of its parent does.
  init(_ userfaultfd: consuming Userfaultfd, like parent: WatchedMemory) {
    self.userfaultfd = userfaultfd
    let present = parent.pieces.withLock { $0 }
    pieces.withLock { $0 = present }
    hasMoved.store(parent.hasMoved.load(ordering: .acquiring), ordering: .releasing)
  }

  // MARK: - Filling

  /// As of `Userfaultfd`; what does not lie together now is left to the next call.
  @unsafe
  @inline(__always)
  func copy(from bytes: UnsafeRawPointer, to range: HostRange) -> Resolution {
    // SAFETY: the caller vouches for the bytes of the range; a part has no more.
    onPresent(range) { unsafe $0.copy(from: bytes, to: $1.start, length: $1.length) }
  }

  @inline(__always)
  func zeropage(_ range: HostRange) -> Resolution {
    onPresent(range) { $0.zeropage($1) }
  }

  @inline(__always)
  func `continue`(_ range: HostRange) -> Resolution {
    onPresent(range) { $0.continue($1) }
  }

  @inline(__always)
  func poison(_ range: HostRange, wakes: Bool = true) -> Resolution {
    onPresent(range) { $0.poison($1, wakes: wakes) }
  }

  @inline(__always)
  private func onPresent(
    _ range: HostRange, _ body: (borrowing Userfaultfd, HostRange) -> Resolution
  ) -> Resolution {
    guard hasMoved.load(ordering: .acquiring) else { return body(userfaultfd, range) }
    guard let part = present(of: range).first, part.original.start == range.start else {
      return Resolution(bytesDone: 0, obstacle: .notRegistered)
    }
    var resolution = body(userfaultfd, part.present)
    if resolution.obstacle == nil, part.present.length < range.length {
      resolution.obstacle = .partial
    }
    return resolution
  }

  /// Wakes the waiters of a range; that it is gone is no error.
  func wake(_ range: HostRange) {
    guard hasMoved.load(ordering: .acquiring) else {
      try? userfaultfd.wake(range)
      return
    }
    for part in present(of: range) { try? userfaultfd.wake(part.present) }
  }

  /// Stops watching a range and wakes its waiters; that it is gone is no error.
  func unregister(_ range: HostRange) {
    guard hasMoved.load(ordering: .acquiring) else {
      try? userfaultfd.unregister(range)
      return
    }
    for part in present(of: range) { try? userfaultfd.unregister(part.present) }
  }

  // MARK: - Moving

  /// The first address of what is at an address now; `nil` when that is no memory of the
  /// session.
  @inline(__always)
  func original(of present: HostAddress) -> HostAddress? {
    guard hasMoved.load(ordering: .acquiring) else { return present }
    return pieces.withLock { pieces in
      pieces.first { $0.presentRange.contains(present) }.map {
        $0.range.start.advanced(by: $0.present.distance(to: present))
      }
    }
  }

  /// The first ranges of what is in a range now.
  func originals(of present: HostRange) -> [HostRange] {
    guard hasMoved.load(ordering: .acquiring) else { return [present] }
    return pieces.withLock { pieces in
      pieces.compactMap { piece in
        piece.presentRange.overlap(with: present).map { overlap in
          HostRange(
            start: piece.range.start.advanced(by: piece.present.distance(to: overlap.start)),
            length: overlap.length)
        }
      }
    }
  }

  /// Where the parts of a range are now, from its start upwards.
  private func present(
    of range: HostRange
  ) -> [(original: HostRange, present: HostRange)] {
    pieces.withLock { pieces in
      pieces.compactMap { piece in
        piece.range.overlap(with: range).map { overlap in
          (
            overlap,
            HostRange(
              start: piece.present.advanced(by: piece.range.start.distance(to: overlap.start)),
              length: overlap.length)
          )
        }
      }.sorted { $0.0.start < $1.0.start }
    }
  }

  /// Pieces into which the memory may be cut. Each fault looks through them.
  static var pieceLimit: Int { 512 }

  /// Notes that what is at `from` now has been moved.
  ///
  /// - Parameter regions: all memory of the session.
  /// - Returns: the first addresses of where it was cut; `nil` when there are too many pieces.
  func move(
    from: HostAddress, to: HostAddress, length: Int, regions: [PagedRegion]
  ) -> [HostAddress]? {
    var cuts: [HostAddress] = []
    let isInLimit = pieces.withLock { pieces in
      if pieces.isEmpty {
        pieces = regions.map { Piece(range: $0.host, present: $0.host.start) }
      }
      let moved = HostRange(start: from, length: length)
      pieces = pieces.flatMap { piece -> [Piece] in
        guard let overlap = piece.presentRange.overlap(with: moved) else { return [piece] }
        let before = piece.present.distance(to: overlap.start)
        let after = piece.range.length - before - overlap.length
        func part(_ offset: Int, _ length: Int, at present: HostAddress) -> Piece {
          Piece(
            range: HostRange(start: piece.range.start.advanced(by: offset), length: length),
            present: present)
        }
        return [
          part(0, before, at: piece.present),
          part(
            before, overlap.length,
            at: to.advanced(by: from.distance(to: overlap.start))),
          part(before + overlap.length, after, at: overlap.end),
        ].filter { $0.range.length > 0 }
      }
      // What did not move, or moved together, is one piece.
      pieces = pieces.reduce(into: []) { joined, piece in
        if let last = joined.last, last.range.end == piece.range.start,
          last.presentRange.end == piece.present
        {
          joined[joined.count - 1].range.length += piece.range.length
        } else {
          joined.append(piece)
        }
      }
      cuts = pieces.map(\.range.start)
      return pieces.count <= Self.pieceLimit
    }
    hasMoved.store(true, ordering: .releasing)
    // Whoever waits at the old place looks again, and finds no mapping.
    try? userfaultfd.wake(HostRange(start: from, length: length))
    return isInLimit ? cuts : nil
  }
}

extension HostRange {
  fileprivate func overlap(with other: HostRange) -> HostRange? {
    let first = max(start, other.start)
    let last = min(end, other.end)
    return first < last ? HostRange(start: first, length: first.distance(to: last)) : nil
  }
}
