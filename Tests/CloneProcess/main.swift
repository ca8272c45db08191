// SPDX-License-Identifier: Apache-2.0

// A clone in a process of its own, which does what it reads from its standard input:
//   verify        touches all of its memory, and says how many blocks are wrong
//   write SEED    writes to every third block, and says so
//   give-back N   gives a block back, and says so
// Usage: clone-process SOCKET IMAGE PAGE-SIZE   (IMAGE may be empty)
//
// It exits when its standard input ends.

import Glibc
import LinuxSystem
import TestSupport

let arguments = CommandLine.arguments
guard arguments.count == 4, let size = Int(arguments[3]).flatMap(PageSize.init(rawValue:)) else {
  fatalError("usage: clone-process SOCKET IMAGE PAGE-SIZE")
}

/// A line for the other side, now.
func say(_ text: String) {
  let bytes = Array((text + "\n").utf8)
  _ = unsafe write(1, bytes, bytes.count)
}

let guest = try CloneGuest(
  arguments[1], image: arguments[2].isEmpty ? nil : arguments[2], pageSize: size)
say("attached")
while let line = readLine() {
  let words = line.split(separator: " ")
  switch words.first {
  case "verify": say("wrong \(try guest.wrongBlocks())")
  case "write":
    let seed = words.last.flatMap { UInt64($0) } ?? 0
    for block in stride(from: 0, to: guest.blocks, by: 3) {
      guest.write(seed << 32 | UInt64(block), block)
    }
    say("written")
  case "give-back":
    try guest.giveBack(words.last.flatMap { Int($0) } ?? 0)
    say("given back")
  default: say("what?")
  }
}
withExtendedLifetime(guest) {}
