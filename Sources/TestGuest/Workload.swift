// SPDX-License-Identifier: Apache-2.0

/// In which order a workload goes through pages.
public enum PageOrder: Hashable, Sendable {
  /// Upwards.
  case sequential
  /// Every page once, in a pseudo-random order that the seed decides.
  case random
  /// With replacement: the page of rank r comes up with a probability of about 1/r; the
  /// ranks are scattered over the pages.
  case zipf(touches: Int)
}

/// Pages (numbers of 4 KiB pages from guest-physical 0) that a dirty workload wrote to.
public struct DirtyRange: Hashable, Sendable {
  /// The pages of one vCPU.
  public var pages: Range<Int>
  /// The generation that it was writing when it ended; counted from 1.
  public var generation: UInt64
  /// How many of the pages have it, from the first; the rest have the one before.
  public var written: Int

  /// What `WorkloadReport.dirtied` says.
  public init(pages: Range<Int>, generation: UInt64, written: Int) {
    self.pages = pages
    self.generation = generation
    self.written = written
  }
}

/// What the guest's vCPUs do. The pages are divided among them.
///
/// The content of a page depends on the seed and its number alone: of 8 pages 1 is zero,
/// 1 is a duplicate (one of 16 contents), 2 compress well and 4 do not.
public enum Workload: Hashable, Sendable {
  /// Writes every page.
  case fill(seed: UInt64)
  /// Compares every page with what `fill` wrote, and where `dirtied` says so with what
  /// `dirty` wrote over it.
  case verify(seed: UInt64, order: PageOrder = .sequential, dirtied: [DirtyRange] = [])
  /// Reads 8 bytes of each page, or writes back what is there (which leaves the content
  /// as it is), and can time it.
  case touch(order: PageOrder, writing: Bool = false, timed: Bool = false, seed: UInt64 = 1)
  /// Stamps the first 8 bytes of the pages, again and again, until the last generation
  /// is written or the workload is stopped.
  ///
  /// `continuing` goes on behind an earlier one of the same seed, pages and vCPUs.
  case dirty(seed: UInt64, generations: UInt64 = .max, continuing: [DirtyRange] = [])
  /// Counts in guest memory, one counter for each vCPU, by `increments` or until stopped.
  /// Counters keep their value between workloads.
  case counter(increments: UInt64 = .max)
}

/// How a workload is run.
public struct WorkloadOptions: Hashable, Sendable {
  /// The pages to work on, by number; `nil` is all but the first MiB.
  public var pages: Range<Int>?
  /// Pages (for `counter` increments) between two looks at a request to stop. A KVM guest
  /// spends about 30 µs on each. `nil` is 256, for `counter` 65536;
  /// 2^24 is the most.
  public var batch: Int?
  /// A pause between two batches, in nanoseconds: limits the rate.
  public var interval: UInt64

  /// Options; the defaults work on everything as fast as they can.
  public init(pages: Range<Int>? = nil, batch: Int? = nil, interval: UInt64 = 0) {
    self.pages = pages
    self.batch = batch
    self.interval = interval
  }
}

/// What a workload did, all vCPUs together.
public struct WorkloadReport: Hashable, Sendable {
  /// Pages dealt with; a page that was touched twice counts twice.
  public var pages: UInt64 = 0
  /// `verify`: pages with other content than they should have.
  public var wrongPages: UInt64 = 0
  /// The number of the lowest of them.
  public var firstWrongPage: Int?
  /// Batches.
  public var batches: UInt64 = 0
  /// From the start, or for a restored guest from its restore, to the end.
  public var elapsedNanoseconds: UInt64 = 0
  /// `counter`: the counters of the vCPUs.
  public var counters: [UInt64] = []
  /// `dirty`: what `verify` needs to know.
  public var dirtied: [DirtyRange] = []
  /// `touch` with `timed`: ticks of the time-stamp counter for each touch, in order for
  /// each vCPU; 2^32 - 1 stands for that many or more.
  public var samples: [UInt32] = []
  /// Whether `stop()` ended it.
  public var wasStopped = false

  /// A report of nothing.
  public init() {}
}
