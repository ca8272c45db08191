// SPDX-License-Identifier: Apache-2.0

import LinuxSystem
import MemoryImage

/// A picture of the memory that two images have: one cell for a range of pages, the darker the
/// more of them differ.
struct DifferenceMap {
  /// Lines of cells, as a rule; a part of memory takes one at least.
  private static let lineGoal = 16

  /// The parts that are shown: those that both images have; where these are many, those that
  /// differ.
  private let parts: [ImageDifference.Part]
  /// Pages of a cell, a power of two.
  let pagesPerCell: Int
  private let columns: Int
  private let digits: Int
  private let shades: [Character]

  /// - Parameters:
  ///   - width: columns that a line may take.
  ///   - isPlain: whether only plain characters are to be used.
  init(_ difference: ImageDifference, width: Int, isPlain: Bool) {
    let common = difference.parts.filter(\.isInBoth)
    parts =
      common.count <= Self.lineGoal ? common : common.filter { !$0.differing.isEmpty }
    digits =
      parts.map { part in
        let last = part.guestAddress.rawValue + UInt64(part.blockCount - 1) * 4096
        return String(last, radix: 16).count
      }.max() ?? 1
    // "0x", the address, two spaces; a power of two, so that lines begin at round addresses.
    let room = max(1, min(width - digits - 4, 128))
    columns = 1 << (Int.bitWidth - 1 - room.leadingZeroBitCount)
    shades = Array(isPlain ? ".-+*#" : "·░▒▓█")
    let goal = max(Self.lineGoal, parts.count)
    var pages = 1
    while true {
      let step = pages * columns
      if parts.reduce(0, { $0 + ($1.blockCount - 1) / step + 1 }) <= goal { break }
      pages *= 2
    }
    pagesPerCell = pages
  }

  /// What the characters mean, then the lines.
  var lines: [String] {
    var lines = [
      "\(Terminal.size(pagesPerCell * 4096)) each; pages that differ:",
      "\(shades[0]) none  \(shades[1]) <=25%  \(shades[2]) <=50%  \(shades[3]) <=75%  "
        + "\(shades[4]) more",
    ]
    for part in parts {
      let step = pagesPerCell * columns
      for first in stride(from: 0, to: part.blockCount, by: step) {
        let end = min(first + step, part.blockCount)
        let address = String(part.guestAddress.rawValue + UInt64(first) * 4096, radix: 16)
        lines.append(
          "0x" + String(repeating: "0", count: digits - address.count) + address + "  "
            + String(
              stride(from: first, to: end, by: pagesPerCell).map { start in
                shade(part, start..<min(start + pagesPerCell, end))
              }))
      }
    }
    return lines
  }

  /// A single page that differs shows.
  private func shade(_ part: ImageDifference.Part, _ pages: Range<Int>) -> Character {
    let share = part.differing.count(in: pages) * 4
    return share == 0 ? shades[0] : shades[1 + min((share - 1) / pages.count, 3)]
  }
}
