// SPDX-License-Identifier: Apache-2.0

import ArgumentParser
import LinuxSystem
import MemoryImage
import SystemPackage

struct ImageVerifyCommand: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "verify", abstract: "Read all of an image and check every page.",
    discussion: """
      With --sample only that share of the data is read, at random places; header, tables, the
      whole index, device states and working set are always checked.

      Exit status: 0 all that was looked at is right; 2 something is damaged; 1 it cannot be read.
      """)

  @Argument(help: "The image.", completion: .file())
  var image: String
  @Option(help: ArgumentHelp("Read a random sample of the data.", valueName: "percent"))
  var sample: Double?
  @Option(help: "What decides the sample. (default: another one each time)")
  var seed: UInt64?
  @Flag(help: "Print one JSON object.")
  var json = false

  private struct Result: Encodable {
    let image: String
    let zeroPages: Int
    let dataPages: Int
    let damagedPages: Int
    let unreadPages: Int
    let pages: Int
    let isSample: Bool
    let seed: UInt64?
    let damages: [String]
    let workingSetFailure: String?
  }

  func validate() throws {
    guard sample.map({ $0 > 0 && $0 <= 100 }) ?? true else {
      throw ValidationError("--sample must be more than 0 and at most 100 percent")
    }
    guard seed == nil || sample != nil else { throw ValidationError("--seed is for --sample") }
  }

  func run() throws {
    let opened = try MemoryImage(path: FilePath(image))
    let progress = ProgressLine("verify")
    let callback = progress.callback
    let seed = seed ?? .random(in: .min ... .max)
    let report = try opened.verify(
      sample: (sample ?? 100) / 100, seed: seed
    ) { done, total in callback?(done * 4096, total * 4096) }
    progress.finish()
    let damages = report.damages.map { damage in
      "region \(damage.region) (\(Terminal.plain(opened.regions[damage.region].name))), "
        + "\(damage.blockCount) pages from guest address "
        + "\(opened.regions[damage.region].guestAddress.advanced(by: damage.firstBlock * 4096)), "
        + "file offset \(damage.fileOffset): \(damage.cause)"
    }
    if json {
      try Terminal.printJSON(
        Result(
          image: image, zeroPages: report.zeroBlocks, dataPages: report.dataBlocks,
          damagedPages: report.damagedBlocks, unreadPages: report.unreadBlocks,
          pages: report.blockCount, isSample: report.isSample, seed: report.isSample ? seed : nil,
          damages: damages,
          workingSetFailure: report.workingSetFailure))
    } else {
      show(report, damages, seed: seed)
    }
    if !report.isIntact { throw wrongPagesStatus }
  }

  private func show(_ report: VerifyReport, _ damages: [String], seed: UInt64) {
    for damage in damages { print(damage) }
    if let failure = report.workingSetFailure {
      print("\(failure); `faultline image working-set \(image) --remove` takes it away")
    }
    let right = "\(report.zeroBlocks + report.dataBlocks) pages are right"
    guard report.isSample else {
      print("\(image): \(right), \(report.damagedBlocks) damaged")
      return
    }
    let read = report.dataBlocks + report.damagedBlocks
    print(
      "\(image): a sample of \(read) of \(read + report.unreadBlocks) pages of data "
        + "(--seed \(seed) takes the same), and all of index and tables: \(right), "
        + "\(report.damagedBlocks) damaged. The other pages were not looked at")
  }
}
