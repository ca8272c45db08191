// SPDX-License-Identifier: Apache-2.0

internal import LinuxSystem
public import MemoryImage
public import SystemPackage

/// Makes images of memory that is somewhere else.
public enum ImageImport {
  /// Writes all regions of a source to an image, in place of a file that is there.
  ///
  /// The image is complete and on storage when this returns. When it throws, or when the
  /// process dies, what was there is unchanged and nothing is left behind. Holes are not read.
  /// Takes 4 MiB of memory for each thread, and the image's index (0.1 % of the memory).
  ///
  /// - Parameters:
  ///   - parent: what the image builds on; with regions of the same addresses and lengths. All
  ///     of it is read first, and counts as progress: what equals any of its blocks is not
  ///     stored again.
  ///   - metadata: strings to keep with the image.
  ///   - threads: how many threads read and compress, the caller's among them.
  ///   - progress: told after each piece how many bytes of memory are done, and how many there
  ///     are; on any of the threads.
  /// - Throws: what the source throws where that is an `ImportError`, otherwise `source`; `image`
  ///   when the image cannot be written. `cause` is the error below.
  public static func write<Source: RegionSource>(
    _ source: Source, to path: FilePath, options: ImageOptions = ImageOptions(),
    parent: MemoryImage? = nil, metadata: [String: String] = [:], threads: Int = 2,
    progress: ImageProgress? = nil
  ) throws(ImportError) {
    try source.requireOther(than: path)
    do {
      var writer = try ImageWriter(
        path: path, regions: source.regions, options: options, parent: parent)
      for (key, value) in metadata { try writer.setMetadata(key: key, value: value) }
      let blocks = writer.blocks
      let pieces = RegionPieces(source.regions)
      let parentBytes = parent?.regions.reduce(0) { $0 + $1.length } ?? 0
      let counter = ByteProgress(total: Int(parentBytes) + source.byteCount, progress)
      try writer.searchParent(threads: threads, counter: counter)
      // Zeros over a parent's data are a change.
      let includesZeros = parent != nil
      try unsafe PieceWork(pieces: pieces.count, threads: threads).run(
        name: "import", bufferLength: PieceWork.pieceLength,
        noMemory: {
          ImportError(
            .inputOutput, path, "there is no memory to read with",
            remedy: "Free 4 MiB for each thread, or use fewer.", errno: $0)
        }
      ) { (number, buffer) throws(ImportError) in
        let piece = pieces[number]
        // SAFETY: the buffer is as long as the longest piece, and this thread's.
        if let part = try unsafe source.read(
          piece, into: buffer, includesZeros: includesZeros, for: path)
        {
          try unsafe write(part.bytes, piece.region, part.offset, to: blocks, path)
        }
        counter.add(piece.bytes.count)
      }
      try writer.finish()
    } catch let error as ImportError {
      throw error
    } catch {
      throw ImportError(.image, path, "the image cannot be written", cause: error)
    }
  }

  @unsafe private static func write(
    _ bytes: UnsafeRawBufferPointer, _ region: Int, _ offset: Int, to blocks: ImageBlockWriter,
    _ path: FilePath
  ) throws(ImportError) {
    do throws(ImageError) {
      // SAFETY: the caller vouches for the bytes.
      try unsafe blocks.write(
        region: region, firstBlock: offset / ImageLimits.blockSize, bytes: bytes)
    } catch {
      throw ImportError(.image, path, "the image cannot be written", cause: error)
    }
  }
}
