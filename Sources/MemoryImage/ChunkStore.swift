// SPDX-License-Identifier: Apache-2.0

internal import LinuxSystem
internal import SystemPackage

/// What became of reading a chunk.
struct ChunkOutcome {
  var outcome: ReadOutcome
  /// Bytes from the start of the file to what is bad.
  var fileOffset: Int
}

/// The stored blocks of one image: of the one that was opened, or of an ancestor.
final class ChunkStore: Sendable {
  let path: FilePath
  let file: OwnedDescriptor
  let id: ImageID
  /// What the file was when it was opened.
  let opened: FileStatus
  let chunks: ChunkGeometry
  /// Bytes.
  let fileLength: Int
  /// Whether reading the file never waits for storage.
  private let isInMemory: Bool
  /// The number of its first block in the chain.
  let base: Int
  /// The number of the first page of its chunk table among the pages of the chain.
  let firstTablePage: Int

  init(
    _ file: consuming OwnedDescriptor, _ catalog: ImageCatalog, base: Int, firstTablePage: Int,
    path: FilePath
  ) {
    self.path = path
    isInMemory = file.isInMemory
    self.file = file
    id = catalog.id
    opened = catalog.status
    chunks = catalog.chunks
    fileLength = catalog.fileLength
    self.base = base
    self.firstTablePage = firstTablePage
  }

  /// Whether the caller's reads may wait, or need not be told to.
  @inline(__always)
  func mayWait(_ waits: Bool) -> Bool { waits || isInMemory }

  /// Blocks of a compressed chunk; 0 where chunks are stored as they are.
  var compressedBlocks: Int { chunks.isStored ? 0 : chunks.blocksPerChunk }

  /// How many blocks from one on may be read at once.
  @inline(__always)
  func room(from number: Int) -> Int {
    chunks.isStored
      ? chunks.chunkCount - (number - base)
      : chunks.blocksPerChunk - (number - base) % chunks.blocksPerChunk
  }

  /// Reads `count` stored blocks from `number` on, all of one chunk; for stored images of
  /// chunks that follow each other.
  ///
  /// - Parameter waits: `false` fails with `wouldBlock` in place of waiting for storage.
  /// - Returns: how many of them are good, and what is wrong with the next one.
  @unsafe
  func readBlocks(
    _ number: Int, count: Int, into buffer: UnsafeMutableRawPointer, pages: VerifiedPages,
    decoders: DecoderPool, waits: Bool
  ) throws(ImageError) -> (good: Int, failure: ChunkOutcome?) {
    let number = number - base
    if chunks.isStored {
      return unsafe readStored(number, count: count, into: buffer, pages: pages, waits: waits)
    }
    let chunk = number / chunks.blocksPerChunk
    let slot = number - chunk * chunks.blocksPerChunk
    let path = path
    return try decoders.withDecoder(
      noMemory: { (errno: Errno) -> ImageError in
        ImageError(.limitExceeded, path, "there is no memory to decompress", errno: errno)
      }
    ) { decoder throws(ImageError) in
      let first = base + chunk * chunks.blocksPerChunk
      // One block of a chunk that lies before the one that is read.
      let isLookedBackAt = count == 1 && first < decoder.firstBlock
      if count == 1, let kept = unsafe decoder.kept(base + number) {
        // SAFETY: the caller has room for the block.
        unsafe buffer.copyMemory(from: kept, byteCount: ImageLimits.blockSize)
        return (1, nil)
      }
      if !decoder.select(firstBlock: first) {
        let failure = decode(chunk, with: decoder, pages: pages, waits: waits)
        if let failure { return (0, failure) }
      }
      let available = decoder.contentLength / ImageLimits.blockSize - slot
      guard available > 0 else {
        return (0, ChunkOutcome(outcome: .damaged, fileOffset: tableOffset(of: chunk)))
      }
      let length = min(count, available) * ImageLimits.blockSize
      // SAFETY: the content has that many bytes from the slot on; the caller has room.
      unsafe buffer.copyMemory(
        from: decoder.content + slot * ImageLimits.blockSize, byteCount: length)
      if isLookedBackAt { unsafe decoder.keep(base + number, buffer) }
      return (min(count, available), nil)
    }
  }

  /// Reads, decompresses and checks a chunk; `nil` when it is good and in the decoder.
  func decode(
    _ chunk: Int, with decoder: ChunkDecoder, pages: VerifiedPages, waits: Bool = true
  ) -> ChunkOutcome? {
    decoder.makeRoom()
    let (outcome, entry) = chunkEntry(chunk, pages, waits: waits)
    guard case .ready = outcome else {
      return ChunkOutcome(outcome: outcome, fileOffset: tableOffset(of: chunk))
    }
    let fileOffset = chunks.dataOffset + entry.offset
    let damaged = ChunkOutcome(outcome: .damaged, fileOffset: fileOffset)
    guard isPossible(entry) else {
      return ChunkOutcome(outcome: .damaged, fileOffset: tableOffset(of: chunk))
    }
    let isRaw = entry.length % ImageLimits.blockSize == 0
    do throws(Errno) {
      // SAFETY: both rooms are as long as the longest chunk of the chain.
      let room = unsafe UnsafeMutableRawBufferPointer(
        start: isRaw ? decoder.content : decoder.frame, count: entry.length)
      try unsafe file.readAll(into: room, at: fileOffset, waits: mayWait(waits))
    } catch {
      return ChunkOutcome(outcome: .failed(error), fileOffset: fileOffset)
    }
    var length = entry.length
    if !isRaw {
      // SAFETY: the frame was just read.
      let frame = unsafe UnsafeRawBufferPointer(start: decoder.frame, count: entry.length)
      guard let claimed = unsafe ZstdDecompressor.contentLength(frame),
        claimed > 0, claimed <= chunks.blocksPerChunk * ImageLimits.blockSize,
        claimed % ImageLimits.blockSize == 0,
        unsafe decoder.decompressor.decompress(
          frame, into: UnsafeMutableRawBufferPointer(start: decoder.content, count: claimed))
      else { return damaged }
      length = claimed
    }
    // SAFETY: `length` bytes of the content were just written.
    let found = unsafe Checksum.of(
      decoder.content, length: length, seed: chunks.seed(ofChunk: chunk))
    guard found == entry.checksum else { return damaged }
    decoder.contentLength = length
    decoder.firstBlock = base + chunk * chunks.blocksPerChunk
    return nil
  }

  /// The entry of a chunk of a compressed image.
  private func chunkEntry(
    _ chunk: Int, _ pages: VerifiedPages, waits: Bool = true
  ) -> (outcome: ReadOutcome, entry: ChunkEntry) {
    var entry = ChunkEntry(offset: 0, length: 0, checksum: 0)
    guard chunk < chunks.chunkCount else { return (.damaged, entry) }
    let (page, slot) = chunks.place(of: chunk)
    let outcome = readTable(page, pages, &entry, waits: waits) { table in
      ChunkEntry(place: table.word(slot * 2), checksum: table.word(slot * 2 + 1))
    }
    return (outcome, entry)
  }

  /// Where its chunks are in the file, in bytes: for benchmarks that decode them by themselves.
  func places(_ pages: VerifiedPages) -> [Range<Int>] {
    (0..<chunks.chunkCount).compactMap { chunk in
      if chunks.isStored {
        let start = chunks.dataOffset + chunk * ImageLimits.blockSize
        return start..<start + ImageLimits.blockSize
      }
      let (outcome, entry) = chunkEntry(chunk, pages)
      guard case .ready = outcome else { return nil }
      let start = chunks.dataOffset + entry.offset
      return start..<start + entry.length
    }
  }

  private func isPossible(_ entry: ChunkEntry) -> Bool {
    entry.length > 0 && entry.length <= chunks.blocksPerChunk * ImageLimits.blockSize
      && entry.offset + entry.length <= chunks.dataLength
  }

  /// Checks what the table says about a chunk, but not the chunk; `nil` when it is good.
  func checkEntry(of chunk: Int, _ pages: VerifiedPages) -> ChunkOutcome? {
    let place = tableOffset(of: chunk)
    if chunks.isStored {
      let (page, slot) = chunks.place(of: chunk)
      var checksum: UInt64 = 0
      let outcome = readTable(page, pages, &checksum) { $0.word(slot) }
      guard case .ready = outcome else {
        return ChunkOutcome(outcome: outcome, fileOffset: place)
      }
      return nil
    }
    let (outcome, entry) = chunkEntry(chunk, pages)
    guard case .ready = outcome else { return ChunkOutcome(outcome: outcome, fileOffset: place) }
    return isPossible(entry) ? nil : ChunkOutcome(outcome: .damaged, fileOffset: place)
  }

  @inline(__always)
  private func readTable<Value>(
    _ page: Int, _ pages: VerifiedPages, _ value: inout Value, waits: Bool = true,
    _ body: (VerifiedPage) -> Value
  ) -> ReadOutcome {
    pages.read(
      firstTablePage + page, from: file, offset: chunks.offset(ofTablePage: page),
      seed: chunks.seed(ofTablePage: page), &value, waits: mayWait(waits), body)
  }

  func tableOffset(of chunk: Int) -> Int {
    chunks.offset(ofTablePage: chunks.place(of: chunk).page)
  }

  /// Blocks as they are: one read, then each is checked.
  @unsafe
  func readStored(
    _ number: Int, count: Int, into buffer: UnsafeMutableRawPointer, pages: VerifiedPages,
    waits: Bool = true
  ) -> (good: Int, failure: ChunkOutcome?) {
    let blockSize = ImageLimits.blockSize
    let start = chunks.dataOffset + number * blockSize
    guard number < chunks.chunkCount else {
      return (0, ChunkOutcome(outcome: .damaged, fileOffset: tableOffset(of: number)))
    }
    let length = min(count, chunks.chunkCount - number) * blockSize
    var failure: Errno?
    var done = 0
    while done < length {
      do throws(Errno) {
        // SAFETY: the caller vouches for room for all blocks.
        let rest = unsafe UnsafeMutableRawBufferPointer(start: buffer + done, count: length - done)
        let got = try unsafe file.read(
          into: rest, at: start + done, waits: mayWait(waits))
        if got == 0 { throw .noData }
        done += got
      } catch {
        // The blocks before the bad spot may be good.
        failure = error
        break
      }
    }
    let (good, problem) = unsafe checkStored(
      number, count: done / blockSize, buffer, pages: pages, waits: waits)
    if let problem { return (good, problem) }
    return (
      good, failure.map { ChunkOutcome(outcome: .failed($0), fileOffset: start + good * blockSize) }
    )
  }

  /// Checks stored blocks that were read; how many are good, and what is wrong with the next one.
  @unsafe
  func checkStored(
    _ number: Int, count: Int, _ buffer: UnsafeRawPointer, pages: VerifiedPages, waits: Bool = true
  ) -> (good: Int, failure: ChunkOutcome?) {
    let blockSize = ImageLimits.blockSize
    var good = 0
    while good < count {
      let chunk = number + good
      let (page, slot) = chunks.place(of: chunk)
      var checksum: UInt64 = 0
      let outcome = readTable(page, pages, &checksum, waits: waits) { $0.word(slot) }
      guard case .ready = outcome else {
        return (good, ChunkOutcome(outcome: outcome, fileOffset: tableOffset(of: chunk)))
      }
      // SAFETY: the block was filled.
      let found = unsafe Checksum.of(
        buffer + good * blockSize, length: blockSize, seed: chunks.seed(ofChunk: chunk))
      if found != checksum {
        let fileOffset = chunks.dataOffset + chunk * blockSize
        return (good, ChunkOutcome(outcome: .damaged, fileOffset: fileOffset))
      }
      good += 1
    }
    return (good, nil)
  }
}
