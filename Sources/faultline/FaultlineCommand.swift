// SPDX-License-Identifier: Apache-2.0

import ArgumentParser
import LinuxSystem

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

  /// As ArgumentParser has it, but a command whose results could not be written has failed.
  static func main() {
    StandardStreams.occupy()
    do {
      var command = try parseAsRoot()
      try command.run()
      try Terminal.finishOutput()
    } catch {
      // Help, too, goes to standard output, with status 0.
      guard exitCode(for: error).isSuccess else { endOutput(with: error) }
      let text = fullMessage(for: error)
      if !text.isEmpty { print(text) }
      do { try Terminal.finishOutput() } catch { exit(withError: error) }
      exit(withError: ExitCode.success)
    }
  }

  /// Ends with a failure; what was printed before it is said to be missing if it is.
  private static func endOutput(with error: any Error) -> Never {
    if let lost = (Result { try Terminal.finishOutput() }).failure,
      !(error is CommandFailure)
    {
      Terminal.note("faultline: \(lost)")
    }
    exit(withError: error)
  }
}

extension Result {
  fileprivate var failure: Failure? { if case .failure(let error) = self { error } else { nil } }
}

/// A failure with a text for the person at the terminal; exit status 1.
struct CommandFailure: Error, CustomStringConvertible {
  let description: String
  init(_ description: String) { self.description = description }
}

/// The exit status when memory is not what it should be.
let wrongPagesStatus = ExitCode(2)
