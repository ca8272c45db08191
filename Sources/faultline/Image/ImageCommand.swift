// SPDX-License-Identifier: Apache-2.0

import ArgumentParser
import Foundation
import LinuxSystem
import MemoryImage
import MemoryImport
import SystemPackage

/// Works on snapshot images.
struct ImageCommand: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "image",
    abstract: "Make, look at, check, compare, merge and export snapshot images.",
    discussion: """
      docs/image-format.md describes the file.

      faultline image create --from-raw memory.bin -o vm.img
      faultline image create --from-firecracker vm.mem --diff vm.diff -o vm.img
      faultline image create --from-core guest.core -o vm.img
      faultline image create --from-raw later.bin --parent vm.img -o later.img
      faultline image info vm.img
      faultline image verify vm.img
      faultline image verify vm.img --sample 5
      faultline image working-set vm.img
      faultline image diff vm.img later.img
      faultline image merge later.img -o whole.img
      faultline image export later.img -o memory.bin

      Exit status: 0; 1 it failed, the message says why; 2 `verify` found damage.
      `diff` has those of diff(1): 0 equal; 1 different; 2 it failed.
      """,
    subcommands: [
      ImageCreateCommand.self, ImageInfoCommand.self, ImageVerifyCommand.self,
      ImageDiffCommand.self, ImageMergeCommand.self, ImageExportCommand.self,
      ImageWorkingSetCommand.self,
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
    try RawExport.write(
      opened, to: FilePath(output), threads: imageThreads, progress: progress.callback)
    progress.finish()
    print("\(output): \(Terminal.size(opened.guestBytes)) of memory")
  }
}
