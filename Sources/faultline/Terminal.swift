// SPDX-License-Identifier: Apache-2.0

import Foundation
import LinuxSystem
import Synchronization
import SystemPackage

/// What the person sees: results on standard output, everything else on standard error.
enum Terminal {
  /// Whether standard error is a terminal.
  static let isInteractive = isatty(STDERR_FILENO) == 1

  /// Columns of the terminal that standard output is (ioctl_tty(2)); `nil` where it is none, or
  /// one that shows plain text only.
  static var outputColumns: Int? {
    guard isatty(STDOUT_FILENO) == 1, ProcessInfo.processInfo.environment["TERM"] != "dumb" else {
      return nil
    }
    var size = winsize()
    // SAFETY: TIOCGWINSZ fills a winsize.
    guard unsafe ioctl(STDOUT_FILENO, UInt(TIOCGWINSZ), &size) == 0, size.ws_col > 0 else {
      return 80
    }
    return Int(size.ws_col)
  }

  /// A line on standard error.
  static func note(_ text: String) {
    FileHandle.standardError.write(Data((text + "\n").utf8))
  }

  /// Sees to it that the results are where they were to go; to be called when all is printed.
  static func finishOutput() throws {
    do throws(Errno) {
      try StandardStreams.flushOutput()
    } catch {
      let reason = error == .ioError ? "" : ": \(error)"
      throw CommandFailure(
        "standard output cannot be written\(reason). The results are incomplete; is the disk full, "
          + "or the output closed?")
    }
  }

  /// One JSON object on one line of standard output.
  static func printJSON(_ value: some Encodable) throws {
    let encoder = JSONEncoder()
    encoder.outputFormatting = [.sortedKeys, .withoutEscapingSlashes]
    print(String(decoding: try encoder.encode(value), as: UTF8.self))
    try finishOutput()
  }

  /// A text from a file, such as a name in an image, with control characters spelt out: a
  /// terminal would obey them.
  static func plain(_ text: String) -> String {
    text.unicodeScalars.reduce(into: "") { plain, scalar in
      switch scalar.properties.generalCategory {
      case .control, .format, .lineSeparator, .paragraphSeparator:
        plain += scalar.escaped(asASCII: true)
      default: plain.unicodeScalars.append(scalar)
      }
    }
  }

  static func duration(_ nanoseconds: UInt64) -> String {
    let value = Double(nanoseconds)
    return switch value {
    case ..<1e3: String(format: "%.0f ns", value)
    case ..<1e6: String(format: "%.1f µs", value / 1e3)
    case ..<1e9: String(format: "%.1f ms", value / 1e6)
    default: String(format: "%.2f s", value / 1e9)
    }
  }

  static func size(_ bytes: Int) -> String {
    let value = Double(bytes)
    return switch value {
    case ..<1_048_576: String(format: "%.0f KiB", value / 1024)
    case ..<1_073_741_824: String(format: "%.1f MiB", value / 1_048_576)
    default: String(format: "%.2f GiB", value / 1_073_741_824)
    }
  }
}

/// A line of progress on a terminal for whatever takes longer than a second; silent
/// everywhere else. Called from any thread.
final class ProgressLine: Sendable {
  private struct State {
    var start = Date()
    var shown = Date.distantPast
    var isVisible = false
  }

  /// What is counted.
  enum Unit { case bytes, count }

  private let label: String
  private let unit: Unit
  private let state = Mutex(State())

  init(_ label: String, unit: Unit = .bytes) {
    self.label = label
    self.unit = unit
  }

  /// The callback that pagers and writers take.
  var callback: (@Sendable (Int, Int) -> Void)? {
    guard Terminal.isInteractive else { return nil }
    return { done, total in self.update(done, total) }
  }

  private func update(_ done: Int, _ total: Int) {
    state.withLock { state in
      let now = Date()
      let elapsed = now.timeIntervalSince(state.start)
      guard elapsed > 1, now.timeIntervalSince(state.shown) > 0.1, total > 0 else { return }
      state.shown = now
      state.isVisible = true
      let rate = Double(done) / elapsed
      let rest = Double(total - done) / max(rate, 1)
      let line = String(
        format: "\r\u{1b}[K%@ %3d %%  %@ of %@  %@/s  %.0f s left", label, done * 100 / total,
        amount(done), amount(total), amount(Int(rate)), rest)
      FileHandle.standardError.write(Data(line.utf8))
    }
  }

  private func amount(_ value: Int) -> String {
    unit == .bytes ? Terminal.size(value) : "\(value)"
  }

  /// Takes the line away.
  func finish() {
    state.withLock { state in
      if state.isVisible { FileHandle.standardError.write(Data("\r\u{1b}[K".utf8)) }
      state.isVisible = false
    }
  }
}
