// SPDX-License-Identifier: Apache-2.0

import ArgumentParser
import Foundation
import LinuxSystem
import MemoryImage
import SystemPackage

/// Works on snapshot images.
struct ImageCommand: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "image",
    abstract: "Make, look at, check, merge and export snapshot images.",
    discussion: """
      docs/image-format.md describes the file.

      faultline image create --from-raw memory.bin -o vm.img
      faultline image create --from-raw later.bin --parent vm.img -o later.img
      faultline image info vm.img
      faultline image verify vm.img
      faultline image merge later.img -o whole.img
      faultline image export later.img -o memory.bin

      Exit status: 0; 1 it failed, the message says why; 2 `verify` found damage.
      """,
    subcommands: [
      ImageCreateCommand.self, ImageInfoCommand.self, ImageVerifyCommand.self,
      ImageMergeCommand.self, ImageExportCommand.self,
    ])
}

/// How an image is written.
struct ImageWriteOptions: ParsableArguments {
  @Option(name: [.short, .long], help: "Where to write.")
  var output: String
  @Option(help: "Compression by zstd, 1 (fast) to 19 (small); 0 stores pages as they are.")
  var level = 1
  @Option(
    help: ArgumentHelp(
      "KiB that are compressed together, 4 to 64: more make a smaller image and slower faults.",
      valueName: "KiB"))
  var chunk = 32

  func validate() throws {
    guard (0...19).contains(level) else { throw ValidationError("--level must be 0 to 19") }
    guard (4...64).contains(chunk), chunk % 4 == 0 else {
      throw ValidationError("--chunk must be 4 to 64, a multiple of 4")
    }
  }

  var options: ImageOptions {
    ImageOptions(
      encoding: level == 0 ? .stored : .zstd(level: level), blocksPerChunk: chunk / 4)
  }
}

/// How many threads work.
let imageThreads = max(1, ProcessInfo.processInfo.activeProcessorCount)

struct ImageCreateCommand: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "create", abstract: "Make an image from a file that holds memory.",
    discussion: """
      The file is read sparsely: holes cost nothing. With --parent the image holds only what
      differs from the parent, which must stay where it is or beside the image.
      """)

  @Option(help: ArgumentHelp("A raw memory file.", valueName: "file"), completion: .file())
  var fromRaw: String
  @Option(help: ArgumentHelp("The image to build on.", valueName: "image"), completion: .file())
  var parent: String?
  @OptionGroup var write: ImageWriteOptions

  func run() throws {
    let progress = ProgressLine("create")
    defer { progress.finish() }
    let parent = try parent.map { try MemoryImage(path: FilePath($0)) }
    try RawImport.makeImage(
      FilePath(write.output), from: FilePath(fromRaw), options: write.options, parent: parent,
      metadata: ["faultline.version": "0.1.0"], threads: imageThreads,
      progress: progress.callback)
    progress.finish()
    print(try ImageDescription(path: write.output).line)
  }
}

struct ImageMergeCommand: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "merge", abstract: "Make an image of its own from one that builds on others.")

  @Argument(help: "The image.", completion: .file())
  var image: String
  @OptionGroup var write: ImageWriteOptions

  func run() throws {
    let progress = ProgressLine("merge")
    defer { progress.finish() }
    try MemoryImage(path: FilePath(image)).merge(
      to: FilePath(write.output), options: write.options, threads: imageThreads,
      progress: progress.callback)
    progress.finish()
    print(try ImageDescription(path: write.output).line)
  }
}

struct ImageExportCommand: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "export", abstract: "Write the memory as a sparse raw file.",
    discussion: "Several regions follow each other in the file.")

  @Argument(help: "The image.", completion: .file())
  var image: String
  @Option(name: [.short, .long], help: "Where to write.")
  var output: String

  func run() throws {
    let progress = ProgressLine("export")
    defer { progress.finish() }
    let opened = try MemoryImage(path: FilePath(image))
    try opened.export(
      to: FilePath(output), threads: imageThreads, progress: progress.callback)
    progress.finish()
    print("\(output): \(Terminal.size(opened.guestBytes)) of memory")
  }
}

struct ImageVerifyCommand: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "verify", abstract: "Read all of an image and check every page.",
    discussion: "Exit status: 0 all of it is right; 2 something is damaged; 1 it cannot be read.")

  @Argument(help: "The image.", completion: .file())
  var image: String
  @Flag(help: "Print one JSON object.")
  var json = false

  private struct Result: Encodable {
    let image: String
    let zeroPages: Int
    let dataPages: Int
    let damagedPages: Int
    let damages: [String]
  }

  func run() throws {
    let opened = try MemoryImage(path: FilePath(image))
    let progress = ProgressLine("verify")
    let callback = progress.callback
    let report = try opened.verify { done, total in callback?(done * 4096, total * 4096) }
    progress.finish()
    let damages = report.damages.map { damage in
      "region \(damage.region) (\(opened.regions[damage.region].name)), "
        + "\(damage.blockCount) pages from guest address "
        + "\(opened.regions[damage.region].guestAddress.advanced(by: damage.firstBlock * 4096)), "
        + "file offset \(damage.fileOffset): \(damage.cause)"
    }
    if json {
      try Terminal.printJSON(
        Result(
          image: image, zeroPages: report.zeroBlocks, dataPages: report.dataBlocks,
          damagedPages: report.damagedBlocks, damages: damages))
    } else {
      for damage in damages { print(damage) }
      print(
        "\(image): \(report.zeroBlocks + report.dataBlocks) pages are right, "
          + "\(report.damagedBlocks) damaged")
    }
    if !report.isIntact { throw wrongPagesStatus }
  }
}
