// SPDX-License-Identifier: Apache-2.0

import ArgumentParser
import HostileGuests

/// A guest of `bench hostile`, which starts this command again for each of them.
struct HostileRoleCommand: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "hostile-role", abstract: "A guest of `bench hostile`.", shouldDisplay: false)

  @Argument(parsing: .allUnrecognized)
  var words: [String]

  func run() throws { throw ExitCode(playHostileRole(words)) }
}
