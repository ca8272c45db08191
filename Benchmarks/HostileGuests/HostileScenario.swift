// SPDX-License-Identifier: Apache-2.0

import Foundation

/// A way to misbehave.
public struct HostileScenario: Sendable, CustomStringConvertible {
  /// What a machine has to have for it.
  public enum Need: Sendable, Equatable {
    /// Free huge pages of 2 MiB.
    case hugePages
    /// To be root: cgroups, mounts, limits.
    case root
  }

  /// How the service is surrounded.
  public enum Surroundings: Sendable {
    case usual
    /// Descriptors that the service may have.
    case descriptors(Int)
    /// Its pids cgroup has no room for another thread while the guests are there.
    case noThreads
    /// The hostile guest is in a memory cgroup with so many bytes.
    case guestMemory(Int)
  }

  /// As it is in results.
  public let name: String
  /// The same, for tests.
  public var description: String { name }
  let role: String
  let words: [String]
  /// Two hold both threads of the pool.
  let copies: Int
  /// What a machine has to have for it.
  public let needs: [Need]
  let surroundings: Surroundings
  /// Whether the service has to refuse it at the hand-over.
  public let isRefused: Bool

  init(
    _ name: String, _ role: String, _ words: String..., copies: Int = 2, needs: [Need] = [],
    isRefused: Bool = false, _ surroundings: Surroundings = .usual
  ) {
    self.name = name
    self.role = role
    self.words = words
    self.copies = copies
    self.needs = needs
    self.surroundings = surroundings
    self.isRefused = isRefused
  }

  /// Whether it hands over as Firecracker does.
  var isFirecracker: Bool { words.contains("protocol=firecracker") }

  /// All of them.
  public static let all: [HostileScenario] = [
    // Storms of madvise(2).
    Self("storm", "storm", "protocol=firecracker", "piece=65536", "pause-us=20", "givers=2"),
    Self("storm-many", "storm", "protocol=missing", "piece=65536", "pause-us=20", "givers=8"),
    Self("storm-whole", "storm", "protocol=missing", "piece=16777216", "pause-us=0"),
    Self("storm-pages", "storm", "protocol=clone", "piece=4096", "pause-us=5"),
    Self(
      "storm-slow", "storm", "protocol=minor", "piece=1048576", "pause-us=1000", "advice=remove"),
    Self(
      "storm-pieces", "storm", "protocol=minor", "page-size=2097152", "pages=8", "piece=4096",
      "pause-us=20", "advice=remove", copies: 1, needs: [.hugePages]),
    Self("swarm", "swarm", "protocol=firecracker", "threads=700", "piece=65536", copies: 1),
    Self("swarm-minor", "swarm", "protocol=minor", "threads=300", "piece=4096", "advice=remove"),
    Self("threads", "threads", "protocol=missing", "threads=200"),
    // What a userfaultfd was made for, and how it is read.
    Self("write-protect", "write-protect", "protocol=missing", "threads=8", isRefused: true),
    Self("write-protect-minor", "write-protect", "protocol=minor", "threads=8", isRefused: true),
    Self("write-protect-silently", "write-protect-silently", "protocol=firecracker", "threads=8"),
    Self("signals", "signals", "protocol=missing", isRefused: true),
    Self("signals-firecracker", "signals", "protocol=firecracker"),
    Self("blocking", "blocking", "protocol=firecracker"),
    Self("blocking-minor", "blocking", "protocol=minor", "pause-us=200"),
    // Connections.
    Self("messages", "messages", "protocol=missing", "piece=65536", "pause-us=0"),
    Self("descriptors", "messages", "protocol=missing", "piece=64", "pause-us=20", "other=1"),
    Self("messages-firecracker", "messages", "protocol=firecracker", "piece=4096", "pause-us=0"),
    Self("silence", "connections", "protocol=missing", "threads=200", "pause-us=1000", copies: 1),
    Self(
      "half-handovers", "connections", "protocol=firecracker", "threads=100", "pause-us=1000",
      "other=1", copies: 1),
    Self("bad-handovers", "handovers", "protocol=missing", "pause-us=100"),
    Self("bad-handovers-firecracker", "handovers", "protocol=firecracker", "pause-us=100"),
    // Processes.
    Self("forks", "forks", "protocol=missing", "pause-us=0"),
    Self("children", "children", "protocol=firecracker", "threads=200", copies: 1),
    Self(
      "few-descriptors", "forks", "protocol=missing", "other=1", copies: 1, needs: [.root],
      .descriptors(512)),
    Self("dying", "dying", "protocol=firecracker"),
    Self("dying-minor", "dying", "protocol=minor"),
    Self("leaving", "leaving", "protocol=missing", copies: 1),
    // Mappings that change.
    Self("moves", "moves", "protocol=missing", "pause-us=0"),
    Self("moves-unseen", "moves", "protocol=firecracker", "other=1"),
    Self("replacements", "replacements", "protocol=firecracker"),
    Self("replacements-unseen", "replacements", "protocol=missing", "other=1"),
    Self("splits", "splits", "protocol=missing", "pause-us=0"),
    Self("splits-in-order", "splits", "protocol=firecracker", "pause-us=0", "other=1"),
    Self("undescribed", "undescribed", "protocol=missing", copies: 1),
    Self(
      "undescribed-huge", "undescribed", "protocol=firecracker", "other=1", copies: 1,
      needs: [.hugePages]),
    // Shortages.
    Self(
      "pool", "shortage", "protocol=firecracker", "pages=8", "pause-us=50000", copies: 1,
      needs: [.hugePages, .root]),
    Self(
      "cgroup", "shortage", "protocol=missing", copies: 1, needs: [.root], .guestMemory(6 << 20)),
    Self("no-threads", "forks", "protocol=missing", needs: [.root], .noThreads),
    // Locks of the kernel.
    Self("own-file", "own-file", "protocol=minor"),
    Self("fuse", "fuse", "protocol=missing", "threads=32", needs: [.root]),
  ]
}
