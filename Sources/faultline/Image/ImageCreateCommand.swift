// SPDX-License-Identifier: Apache-2.0

import ArgumentParser
import LinuxSystem
import MemoryImage
import MemoryImport
import SystemPackage

struct ImageCreateCommand: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "create", abstract: "Make an image from a file that holds memory.",
    discussion: """
      Holes of the file cost nothing. With --parent the image holds only what
      differs from the parent, which must stay where it is or beside the image.
      docs/import.md says what is read.

      faultline image create --from-raw memory.bin -o vm.img
      faultline image create --from-raw later.bin --parent vm.img -o later.img
      faultline image create --from-firecracker vm.mem --diff vm.diff -o vm.img
      faultline image create --from-core guest.core -o vm.img

      Firecracker's memory file does not say where the guest has its memory. Up to
      3 GiB begin at address 0, and the rest at 4 GiB. Before May 2025 it was up to
      3328 MiB: say --gap 3328M for such a file.
      """)

  /// Where Firecracker's gap below 4 GiB begins.
  enum Gap: String, ExpressibleByArgument, CaseIterable {
    case from3GiB = "3G"
    case from3328MiB = "3328M"
    var gap: FirecrackerGap { self == .from3GiB ? .from3GiB : .from3328MiB }
  }

  /// Whose memory a core is.
  enum Owner: String, ExpressibleByArgument, CaseIterable {
    case guest, process
    var kind: CoreFile.Kind { self == .guest ? .guest : .process }
  }

  @Option(
    help: ArgumentHelp("A raw memory file: guest memory from address 0 on.", valueName: "file"),
    completion: .file())
  var fromRaw: String?
  @Option(
    help: ArgumentHelp("A memory file of Firecracker's, from a full snapshot.", valueName: "file"),
    completion: .file())
  var fromFirecracker: String?
  @Option(
    help: ArgumentHelp("An ELF core of gcore or of QEMU's dump-guest-memory.", valueName: "file"),
    completion: .file())
  var fromCore: String?
  @Option(
    help: ArgumentHelp(
      "A diff of Firecracker's, sparse; say it again for each, the oldest first.",
      valueName: "file"),
    completion: .file())
  var diff: [String] = []
  @Option(help: "Where Firecracker's gap below 4 GiB begins.")
  var gap: Gap?
  @Option(help: "Whose memory a core is, where it does not say so itself.")
  var coreOf: Owner?
  @Option(help: ArgumentHelp("The image to build on.", valueName: "image"), completion: .file())
  var parent: String?
  @OptionGroup var write: ImageWriteOptions

  func validate() throws {
    guard [fromRaw, fromFirecracker, fromCore].count(where: { $0 != nil }) == 1 else {
      throw ValidationError("say one of --from-raw, --from-firecracker and --from-core")
    }
    guard fromFirecracker != nil || (diff.isEmpty && gap == nil) else {
      throw ValidationError("--diff and --gap go with --from-firecracker")
    }
    guard fromCore != nil || coreOf == nil else {
      throw ValidationError("--core-of goes with --from-core")
    }
  }

  func run() throws {
    let input = try openInput()
    let parent = try parent.map { try MemoryImage(path: FilePath($0)) }
    let progress = ProgressLine("create")
    defer { progress.finish() }
    try ImageImport.write(
      input, to: FilePath(write.output), options: write.options, parent: parent,
      metadata: ["faultline.version": "0.1.0"], threads: imageThreads,
      progress: progress.callback)
    progress.finish()
    print(try ImageDescription(path: write.output).line)
  }

  private func openInput() throws -> MemoryInput {
    if let fromRaw { return try MemoryInput.raw(FilePath(fromRaw)) }
    if let fromFirecracker {
      return try MemoryInput.firecracker(
        memory: FilePath(fromFirecracker), diffs: diff.map { FilePath($0) },
        layout: .firecracker(gap: gap?.gap ?? .from3GiB))
    }
    let core = try CoreFile(FilePath(fromCore ?? ""), kind: coreOf?.kind)
    if core.absentBytes > 0 {
      Terminal.note(
        "\(core.input.files[0]): \(Terminal.size(core.absentBytes)) were left out of the core "
          + "and become zeros.")
    }
    return core.input
  }
}
