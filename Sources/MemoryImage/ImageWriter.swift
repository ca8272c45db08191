// SPDX-License-Identifier: Apache-2.0

internal import LinuxSystem
public import SystemPackage

/// Writes a new image (docs/image-format.md).
///
/// The image appears under its path in `finish`, complete and on stable storage; until
/// then, and when the writer goes away without it, the path is as it was and nothing is
/// left behind. Blocks that nobody writes are zero, or the parent's.
public struct ImageWriter: ~Copyable, Sendable {
  private let store: BlockStore
  private var states: [DeviceState] = []
  private var stateBytes = 0
  private var metadata: [String: String] = [:]
  private var metadataBytes = 0

  /// Starts an image that will replace what is at `path`, which must be a regular file or
  /// absent; its directory must exist. The file will be readable only for its owner.
  ///
  /// With a parent, blocks that nobody writes are the parent's, and those that are written
  /// but equal to the parent's at the same place (at any place after `searchParent`) are not
  /// stored again. The parent must stay where it is, or beside the new image. Its regions have the same addresses and lengths.
  ///
  /// Throws `invalidLayout` or `limitExceeded` for regions that the format cannot hold, and
  /// `inputOutput` when the file cannot be made.
  public init(
    path: FilePath, regions: [ImageRegion], options: ImageOptions = ImageOptions(),
    parent: MemoryImage? = nil
  ) throws(ImageError) {
    let store = try BlockStore(path: path, regions: regions, options: options, parent: parent)
    try store.takeOverIndex()
    self.store = store
  }

  deinit { store.abandon() }

  /// The image's random name.
  public var id: ImageID { store.layout.id }

  /// A handle for writing blocks from other threads.
  public var blocks: ImageBlockWriter { ImageBlockWriter(store: store) }

  // MARK: - Content

  /// Reads all of the parent's memory, so that blocks which equal any of its blocks are not
  /// stored again, wherever they are: for a whole guest that is written again, in which pages
  /// have moved. Without it only the same place is looked at, which suits few blocks that
  /// changed. Blocks of the parent that are damaged are not made use of.
  ///
  /// Call it before the first write. Takes 4 MiB of memory for each thread. Does nothing where
  /// there is no parent. Throws `limitExceeded` when there is no memory.
  ///
  /// - Parameters:
  ///   - threads: how many threads read, the caller's among them.
  ///   - counter: told of each byte of the parent's memory.
  public mutating func searchParent(
    threads: Int = 2, counter: ByteProgress? = nil
  ) throws(ImageError) {
    try store.learnParent(threads: threads, counter)
  }

  /// Adds a device state, after those added before.
  ///
  /// Throws `invalidLayout` when there is one of this type and instance, and
  /// `limitExceeded`.
  public mutating func add(state: DeviceState) throws(ImageError) {
    guard !states.contains(where: { $0.type == state.type && $0.instance == state.instance })
    else {
      throw ImageError(
        .invalidLayout, store.path,
        "it already has a device state of type \(state.type), instance \(state.instance)")
    }
    guard states.count < ImageLimits.states,
      state.bytes.count <= ImageLimits.stateBytes - stateBytes
    else {
      throw ImageError(.limitExceeded, store.path, "its device states are too many or too large")
    }
    stateBytes += state.bytes.count
    states.append(state)
  }

  /// Sets a metadata string, in place of one with an equal key.
  ///
  /// Throws `limitExceeded` for a key that is empty or longer than 255 bytes, and when
  /// there are too many strings.
  public mutating func setMetadata(key: String, value: String) throws(ImageError) {
    let replaced = metadata[key].map { MetadataTable.length(key: key, value: $0) } ?? 0
    let added = MetadataTable.length(key: key, value: value)
    guard (1...ImageLimits.metadataKeyBytes).contains(key.utf8.count),
      metadata.count < ImageLimits.metadataEntries || replaced > 0,
      metadataBytes - replaced + added <= ImageLimits.metadataBytes
    else {
      throw ImageError(.limitExceeded, store.path, "its metadata are too many or too large")
    }
    // Removing first makes the new spelling of a canonically equivalent key count.
    metadata.removeValue(forKey: key)
    metadata[key] = value
    metadataBytes += added - replaced
  }

  /// Writes blocks; see `ImageBlockWriter.write`.
  @unsafe
  public borrowing func write(
    region: Int, firstBlock: Int, bytes: UnsafeRawBufferPointer
  ) throws(ImageError) {
    try unsafe store.write(region: region, blocks: .from(firstBlock), bytes: bytes)
  }

  // MARK: - End

  /// Completes the image, makes it durable, and gives it its name.
  ///
  /// Throws `incomplete` when an earlier write failed, and `inputOutput`; then the path is
  /// as it was. One exception: when only the last step fails, syncing the directory, the
  /// new image is in place but may be gone after a power failure; the text says so.
  public consuming func finish() throws(ImageError) {
    try store.finish(states: states, metadata: metadata)
  }
}

/// Writes blocks of an image that an `ImageWriter` owns, from any thread.
///
/// Threads that write at the same time must write different blocks. After the writer has
/// finished or gone away every write throws `incomplete`.
public struct ImageBlockWriter: Sendable {
  fileprivate let store: BlockStore

  /// Writes blocks of 4 KiB; those of zeros take no space, equal ones are stored once. Blocks
  /// that are written together are compressed together: 1 MiB at a time is good. A later write of the same block
  /// replaces an earlier one.
  ///
  /// The bytes should not change during the call, for the image would hold a mixture; but
  /// it would be a sound image also then, for what is checked and what is stored are the
  /// same copy.
  ///
  /// Throws `outOfRange` for blocks that the region does not have, and `inputOutput`; after
  /// that `finish` refuses.
  ///
  /// - Parameters:
  ///   - region: number of the region.
  ///   - firstBlock: number of a 4 KiB block in the region.
  ///   - bytes: a multiple of 4 KiB. Read during the call only.
  @unsafe
  public func write(
    region: Int, firstBlock: Int, bytes: UnsafeRawBufferPointer
  ) throws(ImageError) {
    try unsafe store.write(region: region, blocks: .from(firstBlock), bytes: bytes)
  }

  /// Writes blocks that need not follow each other, such as those that changed since the
  /// parent: together, so that they are compressed and written together.
  ///
  /// - Parameters:
  ///   - region: number of the region.
  ///   - blocks: numbers of 4 KiB blocks in the region, each once.
  ///   - bytes: their content, in that order. Read during the call only.
  /// - Throws: as `write(region:firstBlock:bytes:)`.
  @unsafe
  public func write(
    region: Int, blocks: [Int], bytes: UnsafeRawBufferPointer
  ) throws(ImageError) {
    try unsafe store.write(region: region, blocks: .some(blocks), bytes: bytes)
  }
}
