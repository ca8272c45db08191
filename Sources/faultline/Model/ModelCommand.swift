// SPDX-License-Identifier: Apache-2.0

import ArgumentParser
import Foundation
import GuestMemoryModel

/// The executable specification, for people.
struct ModelCommand: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "model",
    abstract: "Step through what userfaultfd and guest_memfd do, in a model of the kernel.",
    discussion: """
      docs/semantics.md walks through the scenarios that matter.

      faultline model                       step by step, on a terminal
      faultline model run scenario.txt      a script, with the state after each step
      faultline model check                 the model against the kernel of this machine
      """,
    subcommands: [ModelRunCommand.self, ModelCheckCommand.self],
    defaultSubcommand: ModelRunCommand.self)
}

/// Runs a script, or what a person types.
struct ModelRunCommand: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "run",
    abstract: "Run a script and show tables, cache and events after each step.",
    discussion: """
      The scene, before the first step:
        memory guest_memfd     or \(ModelMemory.allCases.filter { $0 != .guestMemfd }
        .map(\.name).joined(separator: ", "))
        pages 4                up to \(ModelScript.mostPages)
        kernel faultline       or one of these:
      \(KernelVariant.all.map { "    \($0.name): \($0.summary)" }.joined(separator: "\n"))

      Steps; PAGES is 2, 0-3 or all, and @1 after it names the second mapping:
        register MODES PAGES   MODES such as missing+minor; also wp
        unregister PAGES
        read PAGE              a load through a mapping; it may wait
        write PAGE [VALUE]     a store
        copy PAGES [VALUE] [wp] [dontwake]
        zeropage | continue | poison PAGES [dontwake]
        protect PAGES          UFFDIO_WRITEPROTECT; and unprotect PAGES [dontwake]
        wake PAGES
        pwrite PAGES [VALUE] [readable N]
                               the source can be read up to page N
        fallocate PAGES        and punch PAGES, a hole
        dontneed PAGES         MADV_DONTNEED
        vcpu read PAGE         a vCPU whose slot is bound to the guest_memfd; vcpu write
        bit PAGE on|off        the slot's userfault bitmap

      Exit status: 0; 1 a line could not be understood.
      """)

  @Argument(
    help: "A script; - or nothing for standard input.", completion: .file())
  var script: String?

  func run() throws {
    var session = ModelSession()
    if let script, script != "-" {
      let text: String
      do {
        text = try String(contentsOfFile: script, encoding: .utf8)
      } catch {
        throw CommandFailure("\(script) cannot be read: \(error.localizedDescription)")
      }
      for line in text.split(separator: "\n", omittingEmptySubsequences: false) {
        try take(String(line), &session, echoes: true)
      }
      return
    }
    let isInteractive = isatty(STDIN_FILENO) == 1
    if isInteractive {
      print("guest_memfd, 4 pages, kernel faultline. `faultline model run --help` lists the steps.")
    }
    while true {
      if isInteractive {
        print("> ", terminator: "")
        fflush(nil)
      }
      guard let line = readLine() else { break }
      do {
        try take(line, &session, echoes: !isInteractive)
      } catch let error as CommandFailure where isInteractive {
        print("  \(error)")
      }
    }
    if isInteractive { print() }
  }

  private func take(_ line: String, _ session: inout ModelSession, echoes: Bool) throws {
    if echoes, !line.allSatisfy(\.isWhitespace) { print("> \(line)") }
    do {
      for line in try session.take(line) { print(line) }
    } catch {
      throw CommandFailure("\(error)")
    }
  }
}
