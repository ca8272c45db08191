// SPDX-License-Identifier: Apache-2.0

internal import LinuxSystem
public import SystemPackage

/// A snapshot image, open for reading (docs/image-format.md).
///
/// Any number of threads may read at once. The image keeps its file open: replacing the
/// file under its path does not change what is read. The descriptor and the memory for pages
/// of index and chunk tables (3/4 MiB for each GiB of the guest, and no less than 256 KiB)
/// go with the last reference.
public final class MemoryImage: Sendable {
  /// Where it was opened.
  public let path: FilePath
  /// Its random name.
  public let id: ImageID
  /// What it holds, as a hash.
  public let contentID: ContentID
  /// Guest memory; a region's number is its place here.
  public let regions: [ImageRegion]
  /// Device states, in the order in which they were added.
  public let states: [DeviceState]
  /// Strings about the machine and the snapshot.
  public let metadata: [String: String]

  /// What it builds on, the oldest first; their blocks are read from their files.
  public let ancestors: [ImageAncestor]

  let geometries: [RegionGeometry]
  /// Pages of the index, and of the chunk tables of the whole chain.
  let pages: VerifiedPages
  let decoders: DecoderPool
  /// Its own blocks, and those of its ancestors, the youngest first.
  let own: ChunkStore
  let others: [ChunkStore]

  /// Opens an image and the images that it builds on, and checks header, tables and device
  /// states; memory and index are checked when they are read. The time does not depend on the
  /// size of the guest.
  ///
  /// Throws any code but `outOfRange` and `incomplete`. A file that passes may still have
  /// damaged memory: `verify` tells.
  public convenience init(path: FilePath) throws(ImageError) {
    try self.init(path: path, cachedPages: nil)
  }

  /// The same, with room for that many pages of index and chunk tables, for tests.
  package init(path: FilePath, cachedPages: Int?) throws(ImageError) {
    let file: OwnedDescriptor
    do throws(Errno) {
      file = try OwnedDescriptor(openingForReading: path)
    } catch {
      throw ImageError(.inputOutput, path, "it cannot be opened", errno: error)
    }
    let catalog = try ImageCatalog(reading: file, path: path)
    var base = 0
    var pageCount = catalog.indexPageCount
    var others: [ChunkStore] = []
    for (number, ancestor) in catalog.ancestors.enumerated() {
      let store = try ChunkStore.open(
        ancestor, of: path, older: catalog.ancestors[..<number], base: base,
        firstTablePage: pageCount)
      others.append(store)
      base += ancestor.blockNumbers
      pageCount += store.chunks.tablePageCount
    }
    let own = ChunkStore(file, catalog, base: base, firstTablePage: pageCount, path: path)
    pageCount += own.chunks.tablePageCount
    do throws(Errno) {
      pages = try VerifiedPages(
        capacity: cachedPages
          ?? min(pageCount, Self.cachedPages(blocks: catalog.regions.map(\.blockCount))))
      decoders = try DecoderPool(
        blocks: others.reduce(own.compressedBlocks) { max($0, $1.compressedBlocks) })
    } catch {
      throw ImageError(.limitExceeded, path, "there is no memory for its index", errno: error)
    }
    self.own = own
    self.others = others.reversed()
    self.path = path
    id = catalog.id
    contentID = catalog.contentID
    ancestors = catalog.ancestors
    regions = catalog.regions
    geometries = catalog.geometries
    states = catalog.states
    metadata = catalog.metadata
  }

  /// Pages of index and chunk tables to keep: 3/4 MiB for each GiB, at least 256 KiB.
  private static func cachedPages(blocks: [Int]) -> Int {
    max(64, blocks.reduce(0, +) / 4096 * 3)
  }

  /// The image of the chain that has a stored block.
  @inline(__always)
  func store(of number: Int) -> ChunkStore {
    if number >= own.base { return own }
    // The oldest begins at 0.
    return others.first { number >= $0.base } ?? own
  }

  /// An error about a block, with the names that go with the numbers.
  func failure(
    _ code: ImageError.Code, _ reason: String, region: Int, block: Int? = nil,
    fileOffset: Int? = nil
  ) -> ImageError {
    ImageError(
      code, path, reason, region: region, regionName: regions[region].name, block: block,
      fileOffset: fileOffset)
  }
}
