// SPDX-License-Identifier: Apache-2.0

import Glibc

/// The program that runs inside of the lab (docs/lab.md): takes what the kernel is meant
/// to be, `patched` or `unpatched`, and holds it to that; then a part of the names of the
/// scenarios to run.
@main
struct Lab {
  static func main() {
    guard (2...3).contains(CommandLine.arguments.count),
      let kernel = LabKernel(rawValue: CommandLine.arguments[1])
    else {
      print("usage: guest-memfd-lab patched|unpatched [FILTER]")
      exit(2)
    }
    let scenarios =
      RegistrationScenarios.all + UserMappingScenarios.all + WriteScenarios.all
      + StageTwoScenarios.all + ModelScenarios.all + GuestScenarios.all
    let filter = CommandLine.arguments.count == 3 ? CommandLine.arguments[2] : ""
    let chosen = scenarios.filter { filter.isEmpty || $0.name.contains(filter) }
    exit(run(chosen, on: kernel) == 0 ? 0 : 1)
  }
}
