// SPDX-License-Identifier: Apache-2.0

internal import CGuestProgram

/// A workload divided among vCPUs.
struct WorkloadPlan {
  /// For each vCPU its items, one after the other.
  var items: [[WorkloadItem]]
  /// For each vCPU the bytes of the sample buffer that it writes, for timed touches.
  var sampleParts: [Range<Int>] = []

  /// Bytes of the sample buffer.
  var sampleBytes: Int { sampleParts.last?.upperBound ?? 0 }

  /// - Parameters:
  ///   - guestPages: 4 KiB pages of guest memory.
  ///   - sampleBase: where the guest sees the sample buffer.
  init(
    _ workload: Workload, _ options: WorkloadOptions, processors: Int, guestPages: Int,
    sampleBase: UInt64
  ) throws(GuestError) {
    let all = Int(CGUEST_SYSTEM_AREA) / 4096..<guestPages
    let pages = options.pages ?? all
    guard all.lowerBound <= pages.lowerBound, pages.upperBound <= all.upperBound else {
      throw GuestError(
        .invalidArgument,
        "Workloads cannot use pages \(pages): this guest has \(all) for them")
    }
    let batch = options.batch ?? 256
    guard batch > 0, batch <= Int(WorkloadItem.largestBatch) else {
      throw GuestError(
        .invalidArgument,
        "A batch has 1 to \(WorkloadItem.largestBatch) pages, not \(batch)")
    }
    let shares = Self.divide(pages, among: processors)
    items = []
    switch workload {
    case .fill(let seed):
      items = shares.map {
        [WorkloadItem(command: CGUEST_COMMAND_FILL, seed: seed, pages: $0, batch: batch)]
      }
    case .verify(let seed, let order, let dirtied):
      items = try shares.map { share throws(GuestError) in
        try Self.verification(of: share, seed, order, dirtied, batch)
      }
    case .touch(let order, let writing, let timed, let seed):
      for share in shares {
        var item = WorkloadItem(
          command: CGUEST_COMMAND_TOUCH, seed: seed, pages: share, batch: batch)
        item.setOrder(try Self.shareOfTouches(order, processors))
        item.raw.write = writing ? 1 : 0
        if timed {
          let start = sampleBytes
          item.raw.samples = sampleBase + UInt64(start)
          sampleParts.append(start..<start + Int(item.raw.limit) * 4)
        }
        items.append([item])
      }
      guard sampleBytes <= 1 << 30 else {
        throw GuestError(.invalidArgument, "At most 2^28 touches can be timed at once")
      }
    case .dirty(let seed, let generations, let continuing):
      items = try shares.enumerated().map { index, share throws(GuestError) in
        var item = WorkloadItem(
          command: CGUEST_COMMAND_DIRTY, seed: seed, pages: share, batch: batch)
        item.raw.limit = generations
        item.raw.generation = 1
        if !continuing.isEmpty {
          guard index < continuing.count, continuing[index].pages == share else {
            throw GuestError(
              .invalidArgument,
              "A dirty workload can only go on with the same pages and vCPUs")
          }
          item.raw.generation = continuing[index].generation
          item.raw.position = UInt64(continuing[index].written)
        }
        return share.isEmpty ? [] : [item]
      }
    case .counter(let increments):
      items = (0..<processors).map { index in
        var item = WorkloadItem(
          command: CGUEST_COMMAND_COUNTER, seed: 0, pages: 0..<0, batch: options.batch ?? 65_536)
        item.raw.limit = increments
        item.raw.target = UInt64(
          GuestLayout.mailbox(of: index) + Int(CGUEST_MAILBOX_COUNTER))
        return [item]
      }
    }
  }

  /// Ranges of about the same length, in order.
  static func divide(_ pages: Range<Int>, among count: Int) -> [Range<Int>] {
    (0..<count).map { index in
      pages.lowerBound + pages.count * index / count..<pages.lowerBound + pages.count * (index + 1)
        / count
    }
  }

  private static func shareOfTouches(
    _ order: PageOrder, _ processors: Int
  ) throws(GuestError) -> PageOrder {
    guard case .zipf(let touches) = order else { return order }
    guard touches >= 0 else {
      throw GuestError(.invalidArgument, "The number of touches is negative")
    }
    return .zipf(touches: (touches + processors - 1) / processors)
  }

  /// Cuts a share where dirty ranges begin and end: an item knows one of them at most.
  private static func verification(
    of share: Range<Int>, _ seed: UInt64, _ order: PageOrder, _ dirtied: [DirtyRange],
    _ batch: Int
  ) throws(GuestError) -> [WorkloadItem] {
    if case .zipf = order {
      throw GuestError(.invalidArgument, "verify looks at every page once: no zipf order")
    }
    let bounds = dirtied.flatMap { [$0.pages.lowerBound, $0.pages.upperBound] }
    let cuts = Set(bounds.filter { share.contains($0) } + [share.lowerBound, share.upperBound])
    let edges = cuts.sorted()
    var items: [WorkloadItem] = []
    for (start, end) in zip(edges, edges.dropFirst()) {
      var item = WorkloadItem(
        command: CGUEST_COMMAND_VERIFY, seed: seed, pages: start..<end, batch: batch)
      item.setOrder(order)
      if let dirty = dirtied.first(where: { $0.pages.contains(start) }) {
        guard dirty.generation > 0 else {
          throw GuestError(.invalidArgument, "Generations are counted from 1")
        }
        item.raw.generation = dirty.generation
        item.raw.dirty_first = UInt64(dirty.pages.lowerBound)
        item.raw.dirty_count = UInt64(dirty.pages.count)
        item.raw.split = UInt64(dirty.written)
      }
      items.append(item)
    }
    return items
  }
}
