// SPDX-License-Identifier: Apache-2.0

import ArgumentParser
import FaultlineDaemon

/// Has a session record what its guest touches first.
struct RecordCommand: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "record",
    abstract: "Record in which order the VM of a session touches its pages, for its image.",
    discussion: """
      The next VM with that image gets those pages first. Pages that are there already are not
      recorded: have `faultline serve` record from the start (--record), and end it here.

      faultline record 7             record from here on, after what was recorded before
      faultline record 7 --stop      record no more; what was recorded stays
      faultline record 7 --store     the same, and put it into the image
      """)

  @Argument(help: "The session, as `faultline ps` names it.")
  var session: String
  @Flag(help: "Record no more.")
  var stop = false
  @Flag(help: "Record no more, and put what was recorded into the image.")
  var store = false
  @OptionGroup var control: ControlOptions

  func run() throws {
    let path = "/v1/sessions/\(try identifier(session))"
    var answer = try control.client.request(
      stop || store ? "DELETE" : "POST", path + "/recording")
    if store { answer = try control.client.request("POST", path + "/working-set") }
    if control.json { return control.printJSON(answer) }
    let found: ControlMessage.Session = try ControlClient.decode(answer)
    let image = Terminal.plain(found.image)
    print(
      "session \(found.id) "
        + (store
          ? "records no more; what it recorded is in \(image)"
          : found.records ? "records" : "records no more"))
  }
}
