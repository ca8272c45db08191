// SPDX-License-Identifier: Apache-2.0

// A Firecracker as a handler sees it, in a process of its own: hands over its memory,
// touches it all, gives pages back, and says what was wrong.
// Usage: fake-firecracker SOCKET REGIONS PAGES PAGE-SIZE NAMING PIECE [MEMORY]
//
// MEMORY is `reserved` (if not given), `unreserved`, or the path of a file of a hugetlbfs.
// It exits when its standard input ends.

import Foundation
import LinuxSystem
import SystemPackage
import TestSupport
import Userfault

let arguments = CommandLine.arguments
guard (7...8).contains(arguments.count), let regions = Int(arguments[2]),
  let pages = Int(arguments[3]),
  let pageSize = Int(arguments[4]).flatMap(PageSize.init(rawValue:)),
  let naming = FakeFirecracker.Naming(rawValue: arguments[5]), let piece = Int(arguments[6])
else {
  fatalError("usage: fake-firecracker SOCKET REGIONS PAGES PAGE-SIZE NAMING PIECE [MEMORY]")
}
let memory: FakeFirecracker.Memory =
  switch arguments.dropFirst(7).first {
  case .none, "reserved": .reserved
  case "unreserved": .unreserved
  case .some(let path): .file(FilePath(path))
  }
/// All that it does; throws where the other side is not what it should be.
func run() throws {
  let firecracker = try FakeFirecracker(
    regions: regions, pages: pages, pageSize: pageSize, naming: naming, memory: memory)
  let socket = try UnixSocket(connectingTo: FilePath(arguments[1]))
  try firecracker.send(on: socket, piece: piece)
  print("sent")
  print("wrong \(try firecracker.wrongBlocks())")
  var notZero = 0
  for region in 0..<regions {
    try firecracker.giveBack(region: region, page: 0)
    if firecracker.word(region: region, page: 0) != 0 { notZero += 1 }
  }
  print("not zero \(notZero)")
  while readLine() != nil {}
  // The socket and the descriptor stay open to the end, as Firecracker's do.
  withExtendedLifetime(firecracker) {}
  withExtendedLifetime(socket) {}
}

do {
  try run()
} catch {
  // A handler that refuses or dies is met in many tests: an end and not a crash.
  FileHandle.standardError.write(Data("fake-firecracker: \(error)\n".utf8))
  exit(1)
}
