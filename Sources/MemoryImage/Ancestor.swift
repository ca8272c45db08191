// SPDX-License-Identifier: Apache-2.0

internal import LinuxSystem
public import SystemPackage

/// An image that another one builds on, as that one knows it.
public struct ImageAncestor: Sendable, Hashable {
  /// What it holds: a file is the ancestor when this is its content id.
  public let contentID: ContentID
  /// Where it was when the image was made.
  public let pathHint: FilePath

  let chunkCount: Int
  let blocksPerChunk: Int

  /// Numbers that its blocks take.
  var blockNumbers: Int { chunkCount * blocksPerChunk }
}

/// The ancestor table as it stands in the file (docs/image-format.md, "Ancestors").
enum AncestorTable {
  private static let fixedLength = 48
  private static let hintBytes = 4096

  static func encode(_ ancestors: [ImageAncestor]) -> [UInt8] {
    var bytes: [UInt8] = []
    for ancestor in ancestors {
      let hint = Array(ancestor.pathHint.string.utf8.prefix(hintBytes))
      bytes.append(contentsOf: ancestor.contentID.bytes)
      bytes.append(integer: UInt64(ancestor.chunkCount))
      bytes.append(integer: UInt32(ancestor.blocksPerChunk))
      bytes.append(integer: UInt32(hint.count))
      bytes.append(contentsOf: hint)
      bytes.append(zeros: -bytes.count & 7)
    }
    return bytes
  }

  static func decode(
    _ bytes: [UInt8], count: Int, path: FilePath
  ) throws(ImageError) -> [ImageAncestor] {
    let malformed = ImageError(.invalidLayout, path, "the table of ancestors is malformed")
    var reader = ByteReader(bytes)
    var ancestors: [ImageAncestor] = []
    for _ in 0..<count {
      guard reader.remaining >= fixedLength else { throw malformed }
      let id = ContentID(bytes: reader.next(count: ContentID.length))
      let chunks: UInt64 = reader.next()
      let blocks: UInt32 = reader.next()
      let length = Int(reader.next() as UInt32)
      guard chunks <= UInt64(ImageLimits.chunks), blocks > 0, blocks <= ImageLimits.blocksPerChunk,
        length <= hintBytes, (length + 7) & ~7 <= reader.remaining,
        let hint = String(validating: reader.next(count: length), as: UTF8.self),
        !hint.utf8.contains(0), reader.next(count: -length & 7).allSatisfy({ $0 == 0 }),
        !ancestors.contains(where: { $0.contentID == id })
      else { throw malformed }
      ancestors.append(
        ImageAncestor(
          contentID: id, pathHint: FilePath(hint), chunkCount: Int(chunks),
          blocksPerChunk: Int(blocks)))
    }
    guard reader.remaining == 0 else { throw malformed }
    return ancestors
  }
}

extension ChunkStore {
  /// Finds an ancestor's file: where the hint says, or under the hint's last name in the
  /// directory of the image that builds on it.
  ///
  /// - Parameter older: what it has to build on, itself: so a chain has no circle.
  static func open(
    _ ancestor: ImageAncestor, of image: FilePath, older: ArraySlice<ImageAncestor>, base: Int,
    firstTablePage: Int
  ) throws(ImageError) -> ChunkStore {
    let directory = image.removingLastComponent()
    var places: [FilePath] = []
    if ancestor.pathHint.isAbsolute {
      places.append(ancestor.pathHint)
    } else {
      places.append(directory.pushing(ancestor.pathHint))
    }
    if let name = ancestor.pathHint.lastComponent { places.append(directory.appending(name)) }
    var reasons: [String] = []
    for place in places {
      let file: OwnedDescriptor
      do throws(Errno) {
        file = try OwnedDescriptor(openingForReading: place)
      } catch {
        reasons.append("\(place): \(error)")
        continue
      }
      let catalog = try ImageCatalog(reading: file, path: place)
      guard catalog.contentID == ancestor.contentID else {
        reasons.append("\(place): its content id is \(catalog.contentID)")
        continue
      }
      guard catalog.chunks.chunkCount == ancestor.chunkCount,
        catalog.chunks.blocksPerChunk == ancestor.blocksPerChunk
      else {
        throw ImageError(.invalidLayout, image, "it is wrong about the chunks of \(place)")
      }
      guard catalog.ancestors.elementsEqual(older, by: { $0.contentID == $1.contentID }) else {
        throw ImageError(.invalidLayout, image, "it is wrong about what \(place) builds on")
      }
      return ChunkStore(
        file, catalog, base: base, firstTablePage: firstTablePage, path: place)
    }
    throw ImageError(
      .ancestorMissing, image,
      "it builds on the image with content id \(ancestor.contentID), which is not there ("
        + reasons.joined(separator: "; ") + ")")
  }
}
