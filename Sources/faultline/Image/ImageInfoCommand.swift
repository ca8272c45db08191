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
  let fileBytes: Int
  let encoding: String
  let chunkBytes: Int
  let regions: [Region]
  let ancestors: [Ancestor]
  let states: [State]
  let metadata: [String: String]
  /// Pages; 0 when there is none.
  let workingSetPages: Int
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
    do throws(ImageError) {
      workingSetPages = try opened.workingSet()?.blockCount ?? 0
      workingSetFailure = nil
    } catch {
      workingSetPages = 0
      workingSetFailure = error.reason
    }
    let own = regions.reduce(0) { $0 + $1.ownBytes }
    ratio = Double(own) / Double(max(1, fileBytes))
  }

  /// One line, for what has just been made.
  var line: String {
    "\(image): \(Terminal.size(guestBytes)) of memory in \(Terminal.size(fileBytes))"
      + (ancestors.first.map { ", on top of \($0.path)" } ?? "")
  }

  func show() {
    print(line)
    print("  content id  \(contentID)")
    print("  encoding    \(encoding), \(chunkBytes >> 10) KiB together")
    for region in regions {
      let address = "0x" + String(region.guestAddress, radix: 16)
      print(
        "  region      \(region.name): \(Terminal.size(region.bytes)) at \(address); "
          + "\(Terminal.size(region.ownBytes)) data, \(Terminal.size(region.inheritedBytes)) "
          + "from ancestors, \(Terminal.size(region.zeroBytes)) zero")
    }
    let own = regions.reduce(0) { $0 + $1.ownBytes }
    print(
      "  sizes       \(Terminal.size(guestBytes)) guest, \(Terminal.size(own)) data of its own in "
        + "\(Terminal.size(fileBytes)): ratio " + String(format: "%.2f", ratio))
    if let workingSetFailure {
      print("  working set cannot be used: \(workingSetFailure)")
    } else if workingSetPages > 0 {
      print("  working set \(workingSetPages) pages, \(Terminal.size(workingSetPages * 4096))")
    }
    for ancestor in ancestors {
      print("  builds on   \(ancestor.path)\n              \(ancestor.contentID)")
    }
    for state in states {
      print(
        "  state       type 0x\(String(state.type, radix: 16)), instance \(state.instance): "
          + "\(state.bytes) bytes")
    }
    for (key, value) in metadata.sorted(by: { $0.key < $1.key }) {
      print("  metadata    \(key) = \(value)")
    }
  }
}
