// SPDX-License-Identifier: Apache-2.0

internal import LinuxSystem
public import SystemPackage

/// A snapshot image, open for reading (docs/image-format.md).
///
/// Any number of threads may read at once. The image keeps its file open: replacing the
/// file under its path does not change what is read. The descriptor and the memory of index
/// and chunk table (at most 0.3 % of what was read of the guest) go with the last reference.
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
  let pages: VerifiedPages
  /// Its own blocks, and those of its ancestors, the youngest first.
  let own: ChunkStore
  let others: [ChunkStore]

  /// Opens an image and the images that it builds on, and checks header, tables and device
  /// states; memory and index are checked when they are read. The time does not depend on the
  /// size of the guest.
  ///
  /// Throws any code but `outOfRange` and `incomplete`. A file that passes may still have
  /// damaged memory: `verify` tells.
  public init(path: FilePath) throws(ImageError) {
    let file: OwnedDescriptor
    do throws(Errno) {
      file = try OwnedDescriptor(openingForReading: path)
    } catch {
      throw ImageError(.inputOutput, path, "it cannot be opened", errno: error)
    }
    let catalog = try ImageCatalog(reading: file, path: path)
    do throws(Errno) {
      pages = try VerifiedPages(pageCount: catalog.indexPageCount)
    } catch {
      throw ImageError(.limitExceeded, path, "there is no memory for its index", errno: error)
    }
    var base = 0
    var others: [ChunkStore] = []
    for ancestor in catalog.ancestors {
      others.append(try ChunkStore.open(ancestor, of: path, base: base))
      base += ancestor.blockNumbers
    }
    own = try ChunkStore(file, catalog, base: base, path: path)
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
