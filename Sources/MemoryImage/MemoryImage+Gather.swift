// SPDX-License-Identifier: Apache-2.0

internal import LinuxSystem
internal import SystemPackage

extension MemoryImage {
  /// As `read`, for whoever wants all of it: fewer than `zeros` blocks of zeros between data are
  /// data, and written as such.
  ///
  /// Blocks of a stored image that follow each other in the file are read at once, whatever lies
  /// between them in the region.
  @unsafe
  public func read(
    region: Int, firstBlock: Int, blockCount: Int, zeros: Int, into buffer: UnsafeMutableRawPointer
  ) throws(ImageError) -> ImageRun {
    let geometry = try geometry(region, firstBlock: firstBlock, blockCount: blockCount)
    var gather = unsafe Gather(buffer, pages, decoders)
    var hasData = false
    var block = 0
    // Up to the first block that is not to be had.
    while block < blockCount, gather.problem == nil {
      let (outcome, entry) = indexEntry(geometry, block: firstBlock + block)
      guard case .ready = outcome else {
        guard block > 0 else { throw indexFailure(outcome, region: region, block: firstBlock) }
        break
      }
      let left = blockCount - block
      if entry == 0 {
        let count = run(of: geometry, from: firstBlock + block, limit: left, waits: true) {
          _, entry in entry == 0
        }
        guard count < zeros else { break }
        unsafe (buffer + block * ImageLimits.blockSize).initializeMemory(
          as: UInt8.self, repeating: 0, count: count * ImageLimits.blockSize)
        block += count
        continue
      }
      let number = Int(entry) - 1
      let store = store(of: number)
      let limit = min(left, store.room(from: number))
      let count = run(of: geometry, from: firstBlock + block, limit: limit, waits: true) {
        index, next in
        Int(next) == number + 1 + index
      }
      hasData = true
      if store.compressedBlocks == 0 {
        gather.add(store, number, count: count, at: block)
      } else {
        // SAFETY: the caller vouches for room for all blocks.
        let (good, problem) = try unsafe store.readBlocks(
          number, count: count, into: buffer + block * ImageLimits.blockSize, pages: pages,
          decoders: decoders, waits: true)
        if let problem { gather.note(problem, store, at: block + good) }
      }
      block += count
    }
    gather.flush()
    guard block > 0 else {
      return try unsafe read(
        region: region, firstBlock: firstBlock, blockCount: blockCount, into: buffer)
    }
    let good = gather.good(of: block)
    if good == 0, let (problem, store) = gather.problem.map({ ($0.outcome, $0.store) }) {
      throw dataFailure(problem, store, region: region, block: firstBlock)
    }
    return ImageRun(kind: hasData ? .data : .zero, blockCount: good)
  }
}

/// Stored blocks that are to be read at once: they follow each other in the file, not in the
/// buffer.
@safe
private struct Gather: ~Copyable {
  private struct Part {
    var number = 0
    var count = 0
    /// In blocks from the start of the buffer.
    var place = 0
  }

  // SAFETY: whoever makes it vouches for room for all blocks that are added.
  private let buffer: UnsafeMutableRawPointer
  private let pages: VerifiedPages
  private let decoders: DecoderPool
  private var store: ChunkStore?
  private var parts = InlineArray<32, Part>(repeating: Part())
  private var count = 0
  /// The first place that has no right content, and why.
  private(set) var problem: (place: Int, outcome: ChunkOutcome, store: ChunkStore)?

  @unsafe
  init(_ buffer: UnsafeMutableRawPointer, _ pages: VerifiedPages, _ decoders: DecoderPool) {
    unsafe self.buffer = buffer
    self.pages = pages
    self.decoders = decoders
  }

  /// Of some blocks from the start of the buffer, how many are good.
  func good(of count: Int) -> Int { min(count, problem?.place ?? count) }

  mutating func note(_ outcome: ChunkOutcome, _ store: ChunkStore, at place: Int) {
    if let problem, problem.place <= place { return }
    problem = (place, outcome, store)
  }

  /// Adds blocks; reads those before where they do not follow them.
  mutating func add(_ store: ChunkStore, _ number: Int, count blocks: Int, at place: Int) {
    if let last = self.store, count > 0 {
      let next = parts[count - 1].number + parts[count - 1].count
      if last === store, number == next, count < ReadPlaces.capacity {
        parts[count] = Part(number: number, count: blocks, place: place)
        count += 1
        return
      }
      if last === store, blocks <= 2, number < next {
        // Blocks that were there before, in between: those after them follow those before them.
        for index in 0..<blocks { lookBack(store, number + index, at: place + index) }
        return
      }
    }
    flush()
    self.store = store
    parts[0] = Part(number: number, count: blocks, place: place)
    count = 1
  }

  /// Reads what was added.
  mutating func flush() {
    guard let store, count > 0 else { return }
    let parts = parts
    let count = count
    self.count = 0
    guard count > 1 else { return read(store, parts[0]) }
    let start = store.chunks.dataOffset + (parts[0].number - store.base) * ImageLimits.blockSize
    var places = ReadPlaces()
    for part in 0..<count {
      // SAFETY: whoever made this vouches for the buffer.
      unsafe places.append(
        buffer + parts[part].place * ImageLimits.blockSize,
        length: parts[part].count * ImageLimits.blockSize)
    }
    var found = (try? places.read(from: store.file, at: start)) ?? 0
    for index in 0..<count {
      let part = parts[index]
      let length = part.count * ImageLimits.blockSize
      guard found >= length else {
        // Block by block, to find the one that cannot be read.
        read(store, part)
        found = 0
        continue
      }
      found -= length
      check(store, part)
    }
  }

  private mutating func read(_ store: ChunkStore, _ part: Part) {
    // SAFETY: the buffer has room for the part.
    let (good, failure) = unsafe store.readStored(
      part.number - store.base, count: part.count,
      into: buffer + part.place * ImageLimits.blockSize, pages: pages)
    if let failure { note(failure, store, at: part.place + good) }
  }

  /// A block that may come again and again.
  private mutating func lookBack(_ store: ChunkStore, _ number: Int, at place: Int) {
    let (pages, room) = unsafe (pages, buffer + place * ImageLimits.blockSize)
    do throws(Errno) {
      let failure = try decoders.withDecoder(noMemory: { $0 }) {
        (decoder) throws(Errno) -> ChunkOutcome? in
        if let kept = unsafe decoder.kept(number) {
          // SAFETY: both have a whole block.
          unsafe room.copyMemory(from: kept, byteCount: ImageLimits.blockSize)
          return nil
        }
        // SAFETY: the buffer has room for the block.
        let (_, failure) = unsafe store.readStored(
          number - store.base, count: 1, into: room, pages: pages)
        if failure == nil { unsafe decoder.keep(number, room) }
        return failure
      }
      if let failure { note(failure, store, at: place) }
    } catch {
      read(store, Part(number: number, count: 1, place: place))
    }
  }

  private mutating func check(_ store: ChunkStore, _ part: Part) {
    // SAFETY: the part was read.
    let (good, failure) = unsafe store.checkStored(
      part.number - store.base, count: part.count,
      buffer + part.place * ImageLimits.blockSize, pages: pages)
    if let failure { note(failure, store, at: part.place + good) }
  }
}
