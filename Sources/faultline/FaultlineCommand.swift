// SPDX-License-Identifier: Apache-2.0

import ArgumentParser

/// The command: a thin main for each verb.
@main
struct FaultlineCommand: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "faultline",
    abstract: "Snapshot, lazily restore and measure the memory of virtual machines.",
    discussion: """
      faultline doctor                      what works on this machine, and how to get the rest
      faultline demo                        snapshot a guest, kill it, restore it lazily, verify
      faultline snapshot -o guest.img       fill a test guest and save it
      faultline restore guest.img           run it again; pages come when they are touched
      faultline image info guest.img        make, look at, check, merge and export images
      faultline serve                       serve many VMs: Firecracker's page-fault handler
      faultline ps                          list them; `stats`, `record` and `stop` for one
      faultline bench fault                 measure, against a minimal handler in C
      faultline model                       what the kernel does, step by step

      Exit status: 0 all went well; 1 it failed, the message says why; 2 a page was wrong or
      damaged; 64 the command line is wrong.
      Shell completions: faultline --generate-completion-script bash|zsh|fish
      """,
    version: "faultline 0.1.0",
    subcommands: [
      DoctorCommand.self, DemoCommand.self, SnapshotCommand.self, RestoreCommand.self,
      ServeCommand.self, PsCommand.self, StatsCommand.self, RecordCommand.self,
      StopCommand.self, BenchCommand.self, ImageCommand.self, ModelCommand.self,
      HostileRoleCommand.self,
    ])
}

/// A failure with a text for the person at the terminal; exit status 1.
struct CommandFailure: Error, CustomStringConvertible {
  let description: String
  init(_ description: String) { self.description = description }
}

/// The exit status when memory is not what it should be.
let wrongPagesStatus = ExitCode(2)
