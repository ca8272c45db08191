// SPDX-License-Identifier: Apache-2.0

/// Outcomes and states as a person reads them.
public enum ModelPicture {
  /// What a step came to, one line for itself and one for each touch that went on.
  public static func describe(_ result: StepResult) -> [String] {
    [describe(result.outcome)] + result.resumed.map { "woken: \(describe($0))" }
  }

  /// What a step came to.
  public static func describe(_ outcome: Outcome) -> String {
    switch outcome {
    case .done(let value): value == 0 ? "done" : "done: \(value)"
    case .failed(let errno, 0): errno.rawValue
    case .failed(let errno, let pages): "\(errno.rawValue) after \(pages) pages"
    case .value(staleContent): "stale data: what the memory held before"
    case .value(let value): "content \(value)"
    case .busError: "SIGBUS"
    case .neverEnds: "never ends: it faults again and again, and nobody is told"
    case .waits(let event): "waits: \(describe(event))"
    case .memoryFaultExit(true): "KVM_EXIT_MEMORY_FAULT, for userspace to provide the page"
    case .memoryFaultExit(false): "KVM_EXIT_MEMORY_FAULT"
    case .pages(let bits, let count): "\(count) pages, bits 0x\(String(bits, radix: 16))"
    }
  }

  /// What a registration came to: the ioctls that are offered, by name.
  public static func describeRegistration(_ outcome: Outcome) -> String {
    guard case .done(let mask) = outcome else { return describe(outcome) }
    let names: [(Int, String)] = [
      (3, "COPY"), (4, "ZEROPAGE"), (5, "MOVE"), (6, "WRITEPROTECT"), (7, "CONTINUE"),
      (8, "POISON"), (2, "WAKE"),
    ]
    let offered = names.filter { mask & 1 << UInt64($0.0) != 0 }.map(\.1)
    return "done; offered: \(offered.joined(separator: " "))"
  }

  static func describe(_ event: FaultEvent) -> String {
    let kind =
      event.flags.contains(.minor)
      ? "minor" : event.flags.contains(.writeProtect) ? "write-protect" : "missing"
    let access = event.flags.contains(.write) ? "write" : "read"
    return "\(kind) event, \(access) of page \(event.page) through mapping \(event.mapping)"
  }

  /// The tables, the cache and who waits.
  public static func draw(_ model: Model) -> [String] {
    let setup = model.setup
    var lines = [row("page", (0..<setup.mappingPages).map { "\($0)" }, "")]
    if setup.memory != .anonymous {
      let beyond = Array(repeating: "(end)", count: setup.pagesBeyondEnd)
      lines.append(row("cache", model.cache.map(describe) + beyond, ""))
    }
    for (index, mapping) in model.mappings.enumerated() {
      let label = "mapping \(index)" + (mapping.setup.isPrivate ? " (private)" : "")
      lines.append(row(label, mapping.table.map(describe), registrations(mapping.modes)))
    }
    if setup.memory.isGuestMemfd {
      let cells = model.stageTwo.indices.map { page in
        model.stageTwo[page] ? "mapped" : model.userfaultBitmap[page] ? "ask" : "-"
      }
      lines.append(row("stage 2", cells, ""))
    }
    return lines + model.waiters.map { "waiting: \(describe($0.event))" }
  }

  private static func row(_ label: String, _ cells: [String], _ note: String) -> String {
    let text =
      pad(label, 20) + cells.map { pad($0, 9) }.joined() + (note.isEmpty ? "" : " " + note)
    return String(text.reversed().drop { $0 == " " }.reversed())
  }

  private static func pad(_ text: String, _ width: Int) -> String {
    text + String(repeating: " ", count: max(1, width - text.count))
  }

  private static func describe(_ folio: Folio) -> String {
    switch folio {
    case .absent: "-"
    case .allocated: "stale"
    case .uptodate(let value): "\(value)"
    }
  }

  private static func describe(_ entry: TableEntry) -> String {
    switch entry {
    case .none: "-"
    case .protectedMarker: "wp"
    case .poison: "poison"
    case .mapped(let target, let protection):
      describe(target) + (protection == .none ? "" : protection == .armed ? " wp" : " wp?")
    }
  }

  private static func describe(_ target: TableEntry.Target) -> String {
    switch target {
    case .cache: "cache"
    case .copy(let value): "own \(value)"
    case .zero: "zero"
    }
  }

  /// "MISSING+MINOR", or with the pages where they differ.
  private static func registrations(_ modes: [ModelModes]) -> String {
    var parts: [String] = []
    var start = 0
    for page in 1...modes.count where page == modes.count || modes[page] != modes[start] {
      if !modes[start].isEmpty {
        let pages = start == page - 1 ? "\(start)" : "\(start)-\(page - 1)"
        parts.append("\(modes[start]) on \(pages)")
      }
      start = page
    }
    return parts.joined(separator: ", ")
  }
}
