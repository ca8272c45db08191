// SPDX-License-Identifier: Apache-2.0

import Glibc

/// The program that runs inside of the lab (docs/lab.md): takes what the kernel is meant
/// to be, `patched` or `unpatched`, and holds it to that.
@main
struct Lab {
  static func main() {
    guard CommandLine.arguments.count == 2,
      let kernel = LabKernel(rawValue: CommandLine.arguments[1])
    else {
      print("usage: guest-memfd-lab patched|unpatched")
      exit(2)
    }
    let scenarios =
      RegistrationScenarios.all + UserMappingScenarios.all + WriteScenarios.all
      + StageTwoScenarios.all + GuestScenarios.all
    exit(run(scenarios, on: kernel) == 0 ? 0 : 1)
  }
}
