// SPDX-License-Identifier: Apache-2.0

internal import LinuxSystem
internal import MemoryImage
internal import Synchronization
internal import SystemPackage

/// Images that are open: sessions on the same file share one, and with it its index. It is closed
/// with the last of them.
final class ImageRegistry: Sendable {
  private struct Key: Hashable {
    let path: String
    let identity: FileIdentity
  }

  private struct Entry {
    weak var image: MemoryImage?
  }

  private let entries = Mutex<[Key: Entry]>([:])

  /// The image at a path, and which file that is. A file that replaced another one is another
  /// image.
  func image(at path: String) throws -> (image: MemoryImage, identity: FileIdentity) {
    let key = Key(
      path: path, identity: try OwnedDescriptor(openingForReading: FilePath(path)).status.identity)
    if let image = entries.withLock({ $0[key]?.image }) { return (image, key.identity) }
    let image = try MemoryImage(path: FilePath(path))
    return entries.withLock { entries in
      // Another thread may have been faster.
      if let found = entries[key]?.image { return (found, key.identity) }
      entries = entries.filter { $0.value.image != nil }
      entries[key] = Entry(image: image)
      return (image, key.identity)
    }
  }

  /// Images that are open.
  var count: Int { entries.withLock { $0.values.count { $0.image != nil } } }
}
