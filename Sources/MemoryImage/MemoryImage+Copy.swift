// SPDX-License-Identifier: Apache-2.0

internal import Glibc
internal import LinuxSystem
internal import Synchronization
public import SystemPackage

/// Called with bytes done and bytes in all, from several threads.
public typealias ImageProgress = @Sendable (_ done: Int, _ total: Int) -> Void

extension MemoryImage {
  /// Bytes of all regions.
  public var guestBytes: Int { regions.reduce(0) { $0 + $1.length } }

  /// Writes an image that holds everything itself, whatever this one builds on; device
  /// states, metadata and a sound working set come along.
  ///
  /// Throws what reading and writing throw; then nothing is left behind.
  public func merge(
    to path: FilePath, options: ImageOptions = ImageOptions(), threads: Int = 2,
    progress: ImageProgress? = nil
  ) throws(ImageError) {
    var writer = try ImageWriter(path: path, regions: regions, options: options)
    for state in states { try writer.add(state: state) }
    for (key, value) in metadata { try writer.setMetadata(key: key, value: value) }
    let blocks = writer.blocks
    try unsafe forEachRun(threads: threads, progress) { region, block, bytes throws(ImageError) in
      try unsafe blocks.write(region: region, firstBlock: block, bytes: bytes)
    }
    try writer.finish()
    if let set = try? workingSet() { try Self.setWorkingSet(set.runs, of: path) }
  }

  /// Writes the regions one after the other as a raw file, with holes for zeros: what
  /// `RawImport` reads.
  ///
  /// Throws what reading throws, and `inputOutput`; then nothing is left behind.
  public func export(
    to path: FilePath, threads: Int = 2, progress: ImageProgress? = nil
  ) throws(ImageError) {
    let file = try makeFile(at: path)
    let offsets = regions.indices.map { index in regions[..<index].reduce(0) { $0 + $1.length } }
    let target = RawTarget(number: file.descriptor.rawValue)
    try unsafe forEachRun(threads: threads, progress) { region, block, bytes throws(ImageError) in
      let offset = offsets[region] + block * ImageLimits.blockSize
      do throws(Errno) {
        try unsafe target.write(bytes, at: offset)
      } catch {
        throw ImageError(.inputOutput, path, "it cannot be written", errno: error)
      }
    }
    do throws(Errno) {
      try file.descriptor.synchronize()
      try file.publish().synchronize()
    } catch {
      throw ImageError(.inputOutput, path, "it cannot be completed", errno: error)
    }
  }

  /// A file of the length of all regions, one hole.
  private func makeFile(at path: FilePath) throws(ImageError) -> PendingFile {
    do throws(Errno) {
      let file = try PendingFile(at: path)
      try file.descriptor.setLength(guestBytes)
      return file
    } catch {
      throw ImageError(.inputOutput, path, "it cannot be created", errno: error)
    }
  }

  /// Reads everything, 4 MiB at a time, and hands out the runs of data.
  private func forEachRun(
    threads: Int, _ progress: ImageProgress?,
    _ body:
      @escaping @Sendable (
        _ region: Int, _ block: Int, _ bytes: UnsafeRawBufferPointer
      ) throws(ImageError) -> Void
  ) throws(ImageError) {
    let pieces = ImagePieces(regions)
    let counter = ByteProgress(total: guestBytes, progress)
    try PieceWork(pieces: pieces.count, threads: threads).run(name: "image") {
      [self] (piece) throws(ImageError) in
      let (region, blocks) = pieces[piece]
      let buffer: Mapping
      do throws(Errno) {
        buffer = try Mapping(anonymous: PieceWork.pieceLength)
      } catch {
        throw ImageError(.limitExceeded, path, "there is no memory to read it", errno: error)
      }
      var block = blocks.lowerBound
      while block < blocks.upperBound {
        // SAFETY: the buffer holds a piece.
        let run = try unsafe read(
          region: region, firstBlock: block, blockCount: blocks.upperBound - block,
          into: buffer.pointer)
        if run.kind == .data {
          try unsafe body(
            region, block,
            UnsafeRawBufferPointer(
              start: buffer.pointer, count: run.blockCount * ImageLimits.blockSize))
        }
        block += run.blockCount
      }
      counter.add(blocks.count * ImageLimits.blockSize)
    }
  }
}

/// The regions of an image, cut into pieces.
struct ImagePieces: Sendable {
  private var pieces: [(region: Int, blocks: Range<Int>)] = []

  init(_ regions: [ImageRegion]) {
    let step = PieceWork.pieceLength / ImageLimits.blockSize
    for (number, region) in regions.enumerated() {
      for first in stride(from: 0, to: region.blockCount, by: step) {
        pieces.append((number, first..<min(first + step, region.blockCount)))
      }
    }
  }

  var count: Int { pieces.count }
  subscript(index: Int) -> (region: Int, blocks: Range<Int>) { pieces[index] }
}

/// A file that several threads write to, whose owner waits for them.
private struct RawTarget: Sendable {
  let number: CInt

  @unsafe func write(_ bytes: UnsafeRawBufferPointer, at offset: Int) throws(Errno) {
    var done = 0
    while done < bytes.count {
      // SAFETY: `bytes` is the caller's for the time of the call.
      let written = unsafe pwrite(
        number, bytes.baseAddress.map { unsafe $0 + done }, bytes.count - done, offset + done)
      if written < 0 {
        let error = Errno(rawValue: Glibc.errno)
        if error == .interrupted { continue }
        throw error
      }
      done += written
    }
  }
}
