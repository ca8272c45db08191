// SPDX-License-Identifier: Apache-2.0

internal import LinuxSystem
public import SystemPackage

/// Makes images from files that hold guest memory as it is.
public enum RawImport {
  /// Makes an image with one region, "ram" at guest address 0, from a raw memory file.
  /// Holes of the file are not read.
  ///
  /// Throws `invalidLayout` for a file that is no whole number of 4 KiB pages, and what
  /// reading and writing throw; then nothing is left behind.
  ///
  /// - Parameters:
  ///   - parent: what the image builds on; of the same length.
  ///   - metadata: strings to keep with the image.
  public static func makeImage(
    _ path: FilePath, from source: FilePath, options: ImageOptions = ImageOptions(),
    parent: MemoryImage? = nil, metadata: [String: String] = [:], threads: Int = 2,
    progress: ImageProgress? = nil
  ) throws(ImageError) {
    let file: SourceFile
    do throws(Errno) {
      file = try SourceFile(source)
    } catch {
      throw ImageError(.inputOutput, source, "it cannot be read", errno: error)
    }
    guard file.isRegular else {
      throw ImageError(.notAnImage, source, "it is not a regular file")
    }
    guard file.length > 0, file.length % ImageLimits.blockSize == 0 else {
      throw ImageError(
        .invalidLayout, source, "its \(file.length) bytes are no whole number of 4 KiB pages")
    }
    var writer = try ImageWriter(
      path: path,
      regions: [
        ImageRegion(
          name: "ram", guestAddress: GuestAddress(0), length: file.length, pageSize: .size4KiB)
      ], options: options, parent: parent)
    for (key, value) in metadata { try writer.setMetadata(key: key, value: value) }
    let blocks = writer.blocks
    let length = PieceWork.pieceLength
    let counter = ByteProgress(total: file.length, progress)
    try unsafe PieceWork(pieces: (file.length + length - 1) / length, threads: threads).run(
      name: "import", bufferLength: length,
      noMemory: {
        ImageError(.limitExceeded, source, "there is no memory to read it", errno: $0)
      }
    ) { (piece, buffer) throws(ImageError) in
      let start = piece * length
      let end = min(start + length, file.length)
      try unsafe copy(
        file, start..<end, through: buffer, from: source, to: blocks, writesZeros: parent != nil)
      counter.add(end - start)
    }
    try writer.finish()
  }

  @unsafe private static func copy(
    _ file: SourceFile, _ range: Range<Int>, through buffer: UnsafeMutableRawBufferPointer,
    from source: FilePath, to blocks: ImageBlockWriter,
    writesZeros: Bool
  ) throws(ImageError) {
    do {
      // SAFETY: the buffer is no shorter than the range.
      let bytes = unsafe UnsafeMutableRawBufferPointer(rebasing: buffer[..<range.count])
      unsafe bytes.initializeMemory(as: UInt8.self, repeating: 0)
      let hasData = try unsafe file.read(range, into: bytes)
      // A hole clears what a parent has.
      guard hasData || writesZeros else { return }
      try unsafe blocks.write(
        region: 0, firstBlock: range.lowerBound / ImageLimits.blockSize,
        bytes: UnsafeRawBufferPointer(bytes))
    } catch let error as ImageError {
      throw error
    } catch {
      throw ImageError(
        .inputOutput, source, "it cannot be read", fileOffset: range.lowerBound,
        errno: error as? Errno)
    }
  }
}

/// A file behind a shared reference. Holes are looked for through a descriptor of each call's
/// own: SEEK_DATA moves the position.
private final class SourceFile: Sendable {
  private let descriptor: OwnedDescriptor
  let length: Int
  let isRegular: Bool

  init(_ path: FilePath) throws(Errno) {
    let descriptor = try OwnedDescriptor(openingForReading: path)
    let status = try descriptor.status
    length = status.length
    isRegular = status.isRegular
    self.descriptor = descriptor
  }

  /// Fills a buffer of zeros with the data of a range; whether there is any.
  @unsafe func read(
    _ range: Range<Int>, into buffer: UnsafeMutableRawBufferPointer
  ) throws(Errno) -> Bool {
    // The same file, also when its name has gone to another.
    let seeker = try OwnedDescriptor(
      openingForReading: FilePath("/proc/self/fd/\(descriptor.rawValue)"))
    var hasData = false
    var position = range.lowerBound
    while position < range.upperBound, let data = try seeker.nextData(from: position),
      data < range.upperBound
    {
      let hole = min(try seeker.nextHole(from: data) ?? range.upperBound, range.upperBound)
      // SAFETY: the part lies in the range, which the buffer is as long as.
      try unsafe descriptor.readAll(
        into: UnsafeMutableRawBufferPointer(
          rebasing: buffer[data - range.lowerBound..<hole - range.lowerBound]), at: data)
      hasData = true
      position = hole
    }
    return hasData
  }
}
