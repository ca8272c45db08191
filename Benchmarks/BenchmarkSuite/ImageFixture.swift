// SPDX-License-Identifier: Apache-2.0

internal import CZstd
import Foundation
import LinuxSystem
import MemoryImage
import MemoryImport
import Synchronization
import SystemPackage

/// A raw memory file of real content, and what ours and zstd make of it.
final class ImageFixture: Sendable {
  let length: Int
  let raw: FilePath
  let image: FilePath
  let compressed: FilePath
  private let zstd: String

  /// Collects the content; fails where there is not enough of it, or no zstd.
  init(length: Int) throws {
    guard
      let zstd = ["/usr/bin/zstd", "/usr/local/bin/zstd"].first(where: {
        FileManager.default.isExecutableFile(atPath: $0)
      })
    else {
      throw BenchmarkFailure("There is no zstd to compare with: apt-get install zstd")
    }
    self.zstd = zstd
    self.length = length
    raw = temporaryImage("raw")
    image = temporaryImage("ours")
    compressed = temporaryImage("zstd")
    do {
      try Self.collect(length, into: raw)
    } catch {
      remove()
      throw error
    }
  }

  func remove() {
    for path in [raw, image, compressed] { try? removeFile(path) }
  }

  /// Copies programs and libraries of this machine, each once and in whole pages, as they lie
  /// in the memory of a guest that runs them.
  private static func collect(_ length: Int, into path: FilePath) throws {
    try Data().write(to: URL(fileURLWithPath: path.string))
    let output = try FileHandle(forWritingTo: URL(fileURLWithPath: path.string))
    defer { try? output.close() }
    var seen: Set<FileIdentity> = []
    var done = 0
    for directory in ["/usr/bin", "/usr/lib", "/opt", "/usr/share"] {
      let root = URL(fileURLWithPath: directory)
      guard let files = FileManager.default.enumerator(at: root, includingPropertiesForKeys: nil)
      else { continue }
      for case let file as URL in files where done < length {
        let name = FilePath(file.path)
        guard let status = try? OwnedDescriptor(openingForReading: name).status,
          status.isRegular, status.length >= 1 << 16, seen.insert(status.identity).inserted,
          let data = try? Data(contentsOf: file, options: .alwaysMapped)
        else { continue }
        let count = min(data.count & ~4095, length - done)
        try output.write(contentsOf: data.prefix(count))
        done += count
      }
    }
    guard done == length else {
      throw BenchmarkFailure("This machine has only \(done >> 20) MiB of programs to compress")
    }
  }

  // MARK: - What is measured

  func createImage() throws {
    try? removeFile(image)
    try ImageImport.write(MemoryInput.raw(raw), to: image, threads: 2)
  }

  func runZstd() throws {
    let process = Process()
    process.executableURL = URL(fileURLWithPath: zstd)
    process.arguments = ["-q", "-f", "-1", "-T2", raw.string, "-o", compressed.string]
    try process.run()
    process.waitUntilExit()
    guard process.terminationStatus == 0 else { throw BenchmarkFailure("zstd failed") }
  }

  /// Reads every block with two threads.
  func readAll(_ image: MemoryImage) throws {
    let step = PieceWork.pieceLength / 4096
    let rooms = Mutex<[BenchmarkRoom]>([])
    try PieceWork(pieces: length / PieceWork.pieceLength, threads: 2).run(name: "read") {
      (piece) throws(ImageError) in
      let room = rooms.withLock { $0.popLast() } ?? BenchmarkRoom(PieceWork.pieceLength)
      defer { rooms.withLock { $0.append(room) } }
      var block = piece * step
      while block < (piece + 1) * step {
        // SAFETY: the room is as long as a piece.
        block += try unsafe image.read(
          region: 0, firstBlock: block, blockCount: (piece + 1) * step - block,
          into: room.pointer
        ).blockCount
      }
    }
  }
}

/// Room for one thread.
@safe
final class BenchmarkRoom: @unchecked Sendable {
  // SAFETY: whoever took it out of the list is its only user.
  let pointer: UnsafeMutableRawPointer
  init(_ length: Int) { unsafe pointer = .allocate(byteCount: length, alignment: 4096) }
  deinit { unsafe pointer.deallocate() }
}

/// libzstd on all cores: frames in memory, decoded and nothing else.
final class ChunkDecodePeer: @unchecked Sendable {
  // SAFETY: written in `init` only.
  private let chunk: Int
  private let frames: Mapping
  private let places: [(offset: Int, length: Int)]

  /// Frames of a raw file.
  convenience init(_ fixture: ImageFixture) throws {
    let raw = try Mapping(anonymous: fixture.length)
    try unsafe OwnedDescriptor(openingForReading: fixture.raw).readAll(
      into: UnsafeMutableRawBufferPointer(start: raw.pointer, count: fixture.length), at: 0)
    try self.init(raw: raw, length: fixture.length, chunk: 16384)
  }

  /// Frames of memory.
  init(raw: borrowing Mapping, length: Int, chunk: Int) throws {
    self.chunk = chunk
    let frames = try Mapping(anonymous: length + length / 16)
    let context = unsafe ZSTD_createCCtx()
    defer { unsafe ZSTD_freeCCtx(context) }
    var places: [(Int, Int)] = []
    var offset = 0
    let (content, target, room) = unsafe (raw.pointer, frames.pointer, frames.length)
    for start in stride(from: 0, to: length, by: chunk) {
      // SAFETY: the chunk lies in the memory, and the frame in the mapping, whose rest is the
      // room that libzstd is given.
      let size = unsafe ZSTD_compressCCtx(
        context, target + offset, room - offset, content + start, chunk, 1)
      places.append((offset, size))
      offset += size
    }
    self.frames = frames
    self.places = places
  }

  func run() throws {
    let pieces = places.count / 256
    try PieceWork(pieces: pieces, threads: 2).run(name: "decode") { (piece) throws(Errno) in
      let room = BenchmarkRoom(self.chunk)
      let context = unsafe ZSTD_createDCtx()
      defer { unsafe ZSTD_freeDCtx(context) }
      for (offset, length) in self.places[piece * 256..<(piece + 1) * 256] {
        // SAFETY: the frame lies in the mapping, and the room is as long as a chunk.
        let size = unsafe ZSTD_decompressDCtx(
          context, room.pointer, self.chunk, self.frames.pointer + offset, length)
        guard size == self.chunk else { throw .ioError }
      }
    }
  }
}

/// An image of a guest that has 64 pages of data, the last one among them.
struct SparseImage {
  private let path: FilePath
  private let lastBlock: Int

  init(length: Int) throws {
    path = temporaryImage("sparse")
    lastBlock = length / 4096 - 1
    let writer = try ImageWriter(
      path: path,
      regions: [
        ImageRegion(
          name: "ram", guestAddress: GuestAddress(0), length: length, pageSize: .size4KiB)
      ])
    let page = BenchmarkRoom(4096)
    for number in 0..<64 {
      // SAFETY: the room is one page.
      unsafe page.pointer.initializeMemory(
        as: UInt8.self, repeating: UInt8(number + 1), count: 4096)
      try unsafe writer.write(
        region: 0, firstBlock: lastBlock - number * (lastBlock / 64),
        bytes: UnsafeRawBufferPointer(start: page.pointer, count: 4096))
    }
    try writer.finish()
  }

  func openAndRead() throws {
    let image = try MemoryImage(path: path)
    let page = BenchmarkRoom(4096)
    // SAFETY: the room is one page.
    let read = try unsafe image.read(
      region: 0, firstBlock: lastBlock, blockCount: 1, into: page.pointer)
    guard read.kind == .data else { throw BenchmarkFailure("the sparse image lacks its page") }
  }

  func remove() { try? removeFile(path) }
}
