// SPDX-License-Identifier: Apache-2.0

import ArgumentParser
import Foundation
import LinuxSystem
import MemoryImage
import SystemPackage

struct ImageInfoCommand: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "info", abstract: "Show regions, sizes, chain and metadata.")

  @Argument(help: "The image.", completion: .file())
  var image: String
  @Flag(help: "Print one JSON object.")
  var json = false

  func run() throws {
    let description = try ImageDescription(path: image)
    if json { try Terminal.printJSON(description) } else { description.show() }
  }
}

/// What there is to say about an image.
struct ImageDescription: Encodable {
  struct Region: Encodable {
    let name: String
    let guestAddress: UInt64
    let bytes: Int
    let pageBytes: Int
    let zeroBytes: Int
    let ownBytes: Int
    let inheritedBytes: Int
  }
  struct Ancestor: Encodable {
    let contentID: String
    let path: String
  }
  struct State: Encodable {
    let type: UInt32
    let instance: UInt32
    let bytes: Int
  }

  let image: String
  let contentID: String
  let guestBytes: Int
  let zeroBytes: Int
  let ownBytes: Int
  let inheritedBytes: Int
  let fileBytes: Int
  let encoding: String
  let chunkBytes: Int
  let regions: [Region]
  let ancestors: [Ancestor]
  let states: [State]
  let metadata: [String: String]
  /// Pages; 0 when there is none.
  let workingSetPages: Int
  let workingSetRuns: Int
  let workingSetFailure: String?
  /// Bytes of data of this image for one byte that they take in the file.
  let ratio: Double

  init(path: String) throws {
    let opened = try MemoryImage(path: FilePath(path))
    image = path
    contentID = opened.contentID.description
    guestBytes = opened.guestBytes
    fileBytes = opened.fileLength
    encoding = opened.isCompressed ? "zstd" : "stored"
    chunkBytes = opened.chunkBytes
    regions = try opened.regions.enumerated().map { number, region in
      let usage = try opened.usage(ofRegion: number)
      return Region(
        name: region.name, guestAddress: region.guestAddress.rawValue, bytes: region.length,
        pageBytes: region.pageSize.bytes, zeroBytes: usage.zeroBlocks * 4096,
        ownBytes: usage.ownBlocks * 4096, inheritedBytes: usage.inheritedBlocks * 4096)
    }
    ancestors = opened.ancestors.reversed().map {
      Ancestor(contentID: $0.contentID.description, path: $0.pathHint.string)
    }
    states = opened.states.map {
      State(type: $0.type, instance: $0.instance, bytes: $0.bytes.count)
    }
    metadata = opened.metadata
    var set: WorkingSet?
    do throws(ImageError) {
      set = try opened.workingSet()
      workingSetFailure = nil
    } catch {
      workingSetFailure = error.reason
    }
    workingSetPages = set?.blockCount ?? 0
    workingSetRuns = set?.runs.count ?? 0
    zeroBytes = regions.reduce(0) { $0 + $1.zeroBytes }
    ownBytes = regions.reduce(0) { $0 + $1.ownBytes }
    inheritedBytes = regions.reduce(0) { $0 + $1.inheritedBytes }
    ratio = Double(ownBytes) / Double(max(1, fileBytes))
  }

  /// One line, for what has just been made.
  var line: String {
    "\(image): \(Terminal.size(guestBytes)) of memory in \(Terminal.size(fileBytes))"
      + (ancestors.first.map { ", on top of \(Terminal.plain($0.path))" } ?? "")
  }

  func show() {
    print(line)
    show("content id", contentID)
    show("encoding", "\(encoding), \(chunkBytes >> 10) KiB together")
    show(
      "sizes",
      "\(Terminal.size(guestBytes)) guest: \(Terminal.size(ownBytes)) data of its own, "
        + "\(Terminal.size(inheritedBytes)) from ancestors, \(Terminal.size(zeroBytes)) zero")
    show(
      "",
      "its own data take \(Terminal.size(fileBytes)) with index and tables: ratio "
        + String(format: "%.2f", ratio))
    for (number, region) in regions.enumerated() {
      let address = "0x" + String(region.guestAddress, radix: 16)
      show(
        "region \(number)",
        "\(Terminal.plain(region.name)): \(Terminal.size(region.bytes)) at \(address), pages of "
          + "\(Terminal.size(region.pageBytes))")
      show(
        "",
        "\(Terminal.size(region.ownBytes)) data, \(Terminal.size(region.inheritedBytes)) from "
          + "ancestors, \(Terminal.size(region.zeroBytes)) zero")
    }
    if let workingSetFailure {
      show("working set", "cannot be used: \(workingSetFailure)")
    } else if workingSetPages > 0 {
      show(
        "working set",
        "\(workingSetPages) pages (\(Terminal.size(workingSetPages * 4096))) in "
          + "\(workingSetRuns) runs")
    } else {
      show("working set", "none")
    }
    for ancestor in ancestors {
      show("builds on", Terminal.plain(ancestor.path))
      show("", ancestor.contentID)
    }
    for state in states {
      show(
        "state",
        "type 0x\(String(state.type, radix: 16)), instance \(state.instance): "
          + "\(state.bytes) bytes")
    }
    for (key, value) in metadata.sorted(by: { $0.key < $1.key }) {
      show("metadata", "\(Terminal.plain(key)) = \(Terminal.plain(value))")
    }
  }

  private func show(_ label: String, _ text: String) {
    print("  " + label.padding(toLength: 12, withPad: " ", startingAt: 0) + text)
  }
}
