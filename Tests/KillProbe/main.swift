// SPDX-License-Identifier: Apache-2.0

// Kills guests at random moments (kill -9) while their memory is served, and prints what that left
// behind in this process. Usage: kill-probe ROUNDS SEED

import Foundation
import LinuxSystem
import Pager
import TestSupport

guard CommandLine.arguments.count == 3, let rounds = Int(CommandLine.arguments[1]),
  let seed = UInt64(CommandLine.arguments[2])
else { fatalError("usage: kill-probe ROUNDS SEED") }

/// What a process can leak.
struct Holdings {
  let descriptors = openDescriptorCount()
  let threads = (try? Host.threadCount()) ?? -1
  let residentKiB = Holdings.status("VmRSS:")
  let children = Holdings.children()

  static func status(_ name: String) -> Int {
    let lines = ((try? Host.processFile("status")) ?? "").split(separator: "\n")
    let line = lines.first { $0.hasPrefix(name) }?.split(whereSeparator: \.isWhitespace)
    return line.flatMap { $0.count > 1 ? Int($0[1]) : nil } ?? -1
  }

  /// Children that nobody has waited for yet are among them.
  static func children() -> Int {
    let tasks = (try? FileManager.default.contentsOfDirectory(atPath: "/proc/self/task")) ?? []
    return tasks.reduce(0) { sum, task in
      sum
        + ((try? Host.processFile("task/\(task)/children")) ?? "").split(separator: " ").count
    }
  }
}

/// One guest from its start to its end; returns what went wrong.
func round(_ random: inout SeededRandom, _ pool: PagerPool) throws -> String? {
  let guest = try GuestProcess(
    pages: 1024, threads: 1 + random.below(3), givesBack: random.below(2) == 0)
  var habits = UnsteadySource.Habits()
  habits.longestDelay = [0, 100, 2000][random.below(3)]
  habits.atHandPercent = [100, 50, 0][random.below(3)]
  habits.givesShortRuns = random.below(2) == 0
  let watches = random.below(4) > 0
  let session = try guest.session(
    UnsteadySource(habits, seed: random.next()), watchesProcess: watches,
    faultAround: random.below(2) == 0 ? .off : .adaptive, faultThreads: 1 + random.below(3))
  if random.below(4) == 0 { try session.start(in: pool) } else { try session.start() }
  let goes = random.below(10) > 0
  if goes { try guest.go() }
  // Somebody may be filling ahead when the guest goes.
  let filler =
    random.below(3) > 0 ? nil : try ThreadHandle.start { try? session.populate() }
  Delay.microseconds(UInt32(random.below(goes ? 6000 : 500)))
  guest.kill()
  defer {
    session.release()
    filler?.join()
  }
  if watches, !Delay.until({ session.hasEnded }) { return "the session does not end" }
  return session.failures.isEmpty ? nil : "failures: \(session.failures)"
}

var random = SeededRandom(seed: seed)
let pool = try PagerPool(threads: 2, capacity: 4)
var problems: [String] = []
// What is made once is made by then.
for _ in 0..<25 { if let problem = try round(&random, pool) { problems.append(problem) } }
// A thread that has said that it is done may be about to end.
Delay.microseconds(200_000)
let before = Holdings()
let start = MonotonicClock.nanoseconds
for _ in 0..<rounds { if let problem = try round(&random, pool) { problems.append(problem) } }
let seconds = Double(MonotonicClock.nanoseconds - start) / 1e9
_ = Delay.until {
  let now = Holdings()
  return now.descriptors <= before.descriptors && now.threads <= before.threads
    && now.children <= before.children
}
let after = Holdings()
print(
  "rounds=\(rounds)", "problems=\(problems.count)",
  "descriptors=\(after.descriptors - before.descriptors)",
  "threads=\(after.threads - before.threads)",
  "children=\(after.children - before.children)",
  "resident-kib=\(after.residentKiB - before.residentKiB)",
  "sessions=\(pool.sessionCount)",
  "seconds=\(String(format: "%.1f", seconds))")
for problem in problems.prefix(4) { print(problem) }
