// SPDX-License-Identifier: Apache-2.0

import CHostileVMM
import LinuxSystem
import MemoryImage
import SystemPackage

/// The image of all guests: each word says where it belongs.
enum HostileImage {
  /// Bytes: 4096 pages of 4 KiB, or 8 of 2 MiB.
  static let length = 16 << 20

  static func write(to path: String) throws {
    let region = ImageRegion(
      name: "ram", guestAddress: GuestAddress(0), length: length, pageSize: .size4KiB)
    let writer = try ImageWriter(
      path: FilePath(path), regions: [region], options: ImageOptions(encoding: .stored))
    for block in 0..<length / 4096 {
      let words = (0..<512).map { hostile_word(block, $0) }
      // SAFETY: a page of words.
      try unsafe words.withUnsafeBytes { bytes in
        try unsafe writer.blocks.write(region: 0, firstBlock: block, bytes: bytes)
      }
    }
    try writer.finish()
  }
}
