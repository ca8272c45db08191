// SPDX-License-Identifier: Apache-2.0

import ArgumentParser
import Foundation
import MemoryImage
import SystemPackage

struct ImageWorkingSetCommand: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "working-set",
    abstract: "Show, set or remove the pages that a guest needs first.",
    discussion: """
      The working set is a list of pages in the order in which a guest touched them. It stands
      behind the image, which is not rewritten. As text it has a line for each run of pages:
      the region's number, the first page and how many, such as `0 256 16`.

      faultline image working-set vm.img
      faultline image working-set vm.img --export > pages.txt
      faultline image working-set vm.img --set pages.txt
      faultline image working-set vm.img --remove
      """)

  @Argument(help: "The image.", completion: .file())
  var image: String
  @Option(
    help: ArgumentHelp("Set it from a text file, - for standard input.", valueName: "file"))
  var set: String?
  @Flag(help: "Print it as text.")
  var export = false
  @Flag(help: "Remove it, also a damaged one.")
  var remove = false
  @Flag(help: "Print one JSON object.")
  var json = false

  private struct Description: Encodable {
    struct Run: Encodable {
      let region: Int
      let firstPage: Int
      let pages: Int
    }
    let image: String
    let pages: Int
    let runs: [Run]
  }

  func validate() throws {
    guard [set != nil, export, remove, json].count(where: { $0 }) <= 1 else {
      throw ValidationError("--set, --export, --remove and --json exclude each other")
    }
  }

  func run() throws {
    let path = FilePath(image)
    if remove { return try MemoryImage.setWorkingSet(nil, of: path) }
    if let set {
      let runs = try Self.parse(try text(of: set), name: set)
      try MemoryImage.setWorkingSet(runs, of: path)
    }
    let opened = try MemoryImage(path: path)
    let runs = try opened.workingSet()?.runs ?? []
    if json {
      return try Terminal.printJSON(
        Description(
          image: image, pages: runs.reduce(0) { $0 + $1.blockCount },
          runs: runs.map {
            .init(region: $0.region, firstPage: $0.firstBlock, pages: $0.blockCount)
          }))
    }
    if export {
      for run in runs { print("\(run.region) \(run.firstBlock) \(run.blockCount)") }
      return
    }
    show(opened, runs)
  }

  private func show(_ opened: MemoryImage, _ runs: [WorkingSetRun]) {
    guard !runs.isEmpty else { return print("\(image): no working set") }
    let pages = runs.reduce(0) { $0 + $1.blockCount }
    let share = Double(pages) * 4096 * 100 / Double(opened.guestBytes)
    print(
      "\(image): a working set of \(pages) pages (\(Terminal.size(pages * 4096)), "
        + String(format: "%.1f", share) + " % of the guest) in \(runs.count) runs")
    for (number, region) in opened.regions.enumerated() {
      let own = runs.filter { $0.region == number }
      let count = own.reduce(0) { $0 + $1.blockCount }
      print("  \(Terminal.plain(region.name)): \(count) pages in \(own.count) runs")
    }
  }

  // MARK: - Text

  private func text(of name: String) throws -> String {
    let data: Data
    do {
      data =
        name == "-"
        ? try FileHandle.standardInput.readToEnd() ?? Data()
        : try Data(contentsOf: URL(fileURLWithPath: name))
    } catch {
      throw CommandFailure("\(name) cannot be read: \(error.localizedDescription)")
    }
    return String(decoding: data, as: UTF8.self)
  }

  private static func parse(_ text: String, name: String) throws -> [WorkingSetRun] {
    var runs: [WorkingSetRun] = []
    for (index, line) in text.split(separator: "\n", omittingEmptySubsequences: false).enumerated()
    {
      let words = line.split(whereSeparator: \.isWhitespace)
      if words.isEmpty || words[0].hasPrefix("#") { continue }
      let numbers = words.compactMap { Int($0) }
      guard words.count == 3, numbers.count == 3, numbers.allSatisfy({ $0 >= 0 }) else {
        throw CommandFailure(
          "\(name):\(index + 1): `\(line)` is not a region, a first page and a number of pages")
      }
      runs.append(
        WorkingSetRun(region: numbers[0], firstBlock: numbers[1], blockCount: numbers[2]))
    }
    return runs
  }
}
