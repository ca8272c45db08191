// SPDX-License-Identifier: Apache-2.0

import CXXHash
import CZstd
import GuestMemory
import LinuxSystem
import MemoryImage
import Synchronization
import SystemPackage
import Userfault

/// What filling from an image is held against: its frames decoded by libzstd alone, and the least
/// that any filler has to do which checks what it fills. All with two threads.
final class BulkPeers: @unchecked Sendable {
  // SAFETY: written in `init` only.
  private let file: OwnedDescriptor
  private let length: Int
  private let frames: Mapping
  /// Chunks: where in the file, and where in `frames`.
  private let places: [(file: Range<Int>, frame: Int)]
  private let isCompressed: Bool
  /// Bytes of the content of a chunk, but for the last.
  private let chunkBytes: Int

  init(_ image: MemoryImage) throws {
    file = try OwnedDescriptor(openingForReading: image.path)
    length = image.regions[0].length
    isCompressed = image.isCompressed
    chunkBytes = image.isCompressed ? image.chunkBytes : 4096
    var offset = 0
    var places: [(Range<Int>, Int)] = []
    for place in image.chunkPlaces {
      places.append((place, offset))
      offset += place.count
    }
    self.places = places
    frames = try Mapping(anonymous: (offset + 4095) & ~4095)
    guard isCompressed else { return }
    for (place, frame) in places {
      // SAFETY: the mapping has room for all frames.
      try unsafe file.readAll(
        into: UnsafeMutableRawBufferPointer(start: frames.pointer + frame, count: place.count),
        at: place.lowerBound)
    }
  }

  /// Chunks in pieces of 1 MiB of content.
  private var perPiece: Int { (1 << 20) / chunkBytes }
  private var pieceCount: Int { (places.count + perPiece - 1) / perPiece }

  /// Blocks of 4 KiB in all chunks.
  var blocks: Int { places.count * chunkBytes / 4096 }

  /// libzstd alone: from memory to memory that stays in the processor's cache.
  func decode() throws {
    let tools = Tools(length: chunkBytes)
    try PieceWork(pieces: pieceCount, threads: 2).run(name: "decode") { (piece) throws(Errno) in
      let tool = tools.take()
      defer { tools.put(tool) }
      let (room, context) = (tool.room, unsafe tool.context)
      for (place, frame) in self.chunks(of: piece) {
        let source = unsafe self.frames.pointer + frame
        if place.count % 4096 == 0 {
          unsafe room.pointer.copyMemory(from: source, byteCount: place.count)
          continue
        }
        // SAFETY: the frame lies in the mapping, and the room is as long as a chunk.
        let size = unsafe ZSTD_decompressDCtx(
          context, room.pointer, self.chunkBytes, source, place.count)
        guard ZSTD_isError(size) == 0 else { throw .ioError }
      }
    }
  }

  /// The floor: read, decode, hash, UFFDIO_COPY; no index, no page states, no events.
  func fill(_ target: RawTarget) throws {
    let tools = Tools(length: 1 << 20)
    try PieceWork(pieces: pieceCount, threads: 2).run(name: "floor") { (piece) throws(Errno) in
      let tool = tools.take()
      defer { tools.put(tool) }
      let (room, frame, context) = (tool.room, tool.frame, unsafe tool.context)
      let chunks = self.chunks(of: piece)
      var done = 0
      if self.isCompressed {
        for (place, _) in chunks {
          let isRaw = place.count % 4096 == 0
          let into = unsafe isRaw ? room.pointer + done : frame.pointer
          try unsafe self.file.readAll(
            into: UnsafeMutableRawBufferPointer(start: into, count: place.count),
            at: place.lowerBound)
          var size = place.count
          if !isRaw {
            // SAFETY: the rooms are as long as a piece.
            size = unsafe ZSTD_decompressDCtx(
              context, room.pointer + done, self.chunkBytes, frame.pointer, place.count)
            guard ZSTD_isError(size) == 0 else { throw .ioError }
          }
          _ = unsafe cxxhash_64(room.pointer + done, size, 1)
          done += size
        }
      } else {
        let start = chunks.first?.file.lowerBound ?? 0
        done = chunks.count * 4096
        try unsafe self.file.readAll(
          into: UnsafeMutableRawBufferPointer(start: room.pointer, count: done), at: start)
        for block in 0..<chunks.count {
          _ = unsafe cxxhash_64(room.pointer + block * 4096, 4096, 1)
        }
      }
      // SAFETY: the room has that many bytes, and the target as much memory as the image.
      let resolution = unsafe target.userfaultfd.copy(
        from: room.pointer, to: target.range.start.advanced(by: piece << 20),
        length: min(done, target.range.length - piece << 20))
      guard resolution.obstacle == nil else { throw .ioError }
    }
  }

  private func chunks(of piece: Int) -> ArraySlice<(file: Range<Int>, frame: Int)> {
    places[piece * perPiece..<min((piece + 1) * perPiece, places.count)]
  }
}

/// What threads decode with, made once for each.
private final class Tools: Sendable {
  @safe
  final class Tool: @unchecked Sendable {
    // SAFETY: whoever took it out of the list is its only user.
    let room: BenchmarkRoom
    let frame: BenchmarkRoom
    let context: OpaquePointer?

    init(length: Int) {
      room = BenchmarkRoom(length)
      frame = BenchmarkRoom(length)
      unsafe context = ZSTD_createDCtx()
    }

    deinit { unsafe ZSTD_freeDCtx(context) }
  }

  private let length: Int
  private let free = Mutex<[Tool]>([])

  init(length: Int) { self.length = length }

  func take() -> Tool { free.withLock { $0.popLast() } ?? Tool(length: length) }
  func put(_ tool: Tool) { free.withLock { $0.append(tool) } }
}

/// A userfaultfd that threads share, and the memory that it watches.
final class RawTarget: Sendable {
  let userfaultfd: Userfaultfd
  let range: HostRange
  init(_ range: HostRange) throws {
    let userfaultfd = try Userfaultfd(wanting: [])
    try userfaultfd.register(range, modes: .missing)
    self.userfaultfd = userfaultfd
    self.range = range
  }
}
