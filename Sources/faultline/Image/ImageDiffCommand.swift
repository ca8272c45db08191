// SPDX-License-Identifier: Apache-2.0

import ArgumentParser
import LinuxSystem
import MemoryImage
import SystemPackage

struct ImageDiffCommand: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "diff", abstract: "Show where the memory of two images differs.",
    discussion: """
      Memory is matched by guest address, whatever the regions are called. Pages of
      4 KiB. Images of one chain are compared in the time that their changes take.
      Device states and metadata do not count.

      faultline image diff before.img after.img
      faultline image diff before.img after.img --list

      Exit status, as of diff(1): 0 the memory is equal; 1 it differs; 2 an image
      cannot be read or is damaged, the message says why; 64 the command line is
      wrong.
      """)

  @Argument(help: "The first image.", completion: .file())
  var first: String
  @Argument(help: "The second image.", completion: .file())
  var second: String
  @Flag(help: "Also list the ranges of pages that differ.")
  var list = false
  @Flag(help: "Print one JSON object.")
  var json = false

  func run() throws {
    let isEqual: Bool
    do {
      let images = (try MemoryImage(path: FilePath(first)), try MemoryImage(path: FilePath(second)))
      let progress = ProgressLine("diff")
      defer { progress.finish() }
      let difference = try ImageDifference(
        images.0, images.1, threads: imageThreads, progress: progress.callback)
      progress.finish()
      isEqual = difference.isEqual
      let report = DifferenceReport(
        difference, (first, images.0), (second, images.1), list: list)
      if json {
        try Terminal.printJSON(report)
      } else {
        report.show(difference)
      }
      try Terminal.finishOutput()
    } catch {
      // 1 would mean that they differ.
      Terminal.note("Error: \(error)")
      throw ExitCode(2)
    }
    if !isEqual { throw ExitCode(1) }
  }
}

/// What there is to say about how two images differ.
private struct DifferenceReport: Encodable {
  /// Which images have some memory.
  enum Holder: String, Encodable { case both, first, second }

  struct Run: Encodable {
    let guestAddress: UInt64
    let pages: Int
  }

  struct Region: Encodable {
    let name: String
    let guestAddress: UInt64
    let bytes: Int
    let presentIn: Holder
    let pages: Int
    let differingPages: Int
    let differingBytes: Int
    let zeroInFirstOnly: Int
    let zeroInSecondOnly: Int
    let ranges: [Run]?
  }

  let first: String
  let second: String
  let equal: Bool
  /// Of the memory that both have.
  let pages: Int
  let differingPages: Int
  let differingBytes: Int
  /// Pages that had to be read to know.
  let comparedPages: Int
  let regions: [Region]

  init(
    _ difference: ImageDifference, _ first: (path: String, image: MemoryImage),
    _ second: (path: String, image: MemoryImage), list: Bool
  ) {
    self.first = first.path
    self.second = second.path
    equal = difference.isEqual
    pages = difference.commonBlocks
    differingPages = difference.differingBlocks
    differingBytes = difference.differingBlocks * 4096
    comparedPages = difference.parts.reduce(0) { $0 + $1.comparedBlocks }
    regions = difference.parts.map { part in
      let name =
        part.first.map { first.image.regions[$0.region].name }
        ?? part.second.map { second.image.regions[$0.region].name }
      var ranges: [Run]?
      if list {
        var runs: [Run] = []
        part.differing.forEachRange { range in
          runs.append(
            Run(
              guestAddress: part.guestAddress.rawValue + UInt64(range.lowerBound) * 4096,
              pages: range.count))
        }
        ranges = runs
      }
      return Region(
        name: name ?? "", guestAddress: part.guestAddress.rawValue, bytes: part.blockCount * 4096,
        presentIn: part.isInBoth ? .both : part.first != nil ? .first : .second,
        pages: part.blockCount, differingPages: part.differing.count,
        differingBytes: part.differing.count * 4096, zeroInFirstOnly: part.zeroInFirst,
        zeroInSecondOnly: part.zeroInSecond, ranges: ranges)
    }
  }

  // MARK: - Text

  func show(_ difference: ImageDifference) {
    let columns = Terminal.outputColumns
    let missing = regions.filter { $0.presentIn != .both }.reduce(0) { $0 + $1.bytes }
    var summary = "\(first) and \(second): "
    if equal {
      summary += "equal, \(pages) pages"
    } else {
      summary +=
        "\(differingPages) of \(pages) pages differ (\(Terminal.size(differingBytes)) of "
        + "\(Terminal.size(pages * 4096)))"
      if missing > 0 { summary += ", \(Terminal.size(missing)) only in one of them" }
    }
    print(summary)
    for region in regions {
      print("  \(line(region))")
      for range in region.ranges ?? [] {
        print("    0x\(String(range.guestAddress, radix: 16)) \(range.pages)")
      }
    }
    guard differingPages > 0 else { return }
    print()
    let map = DifferenceMap(difference, width: (columns ?? 80) - 2, isPlain: columns == nil)
    for line in map.lines { print("  \(line)") }
  }

  private func line(_ region: Region) -> String {
    let place = "region \(region.name) at 0x\(String(region.guestAddress, radix: 16))"
    switch region.presentIn {
    case .first: return "\(place): only in \(first), \(Terminal.size(region.bytes))"
    case .second: return "\(place): only in \(second), \(Terminal.size(region.bytes))"
    case .both:
      if region.differingPages == 0 { return "\(place): equal, \(region.pages) pages" }
      return "\(place): \(region.differingPages) of \(region.pages) pages differ, "
        + "of these \(region.zeroInFirstOnly) zero in \(first), "
        + "\(region.zeroInSecondOnly) zero in \(second)"
    }
  }
}
