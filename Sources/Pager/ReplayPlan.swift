// SPDX-License-Identifier: Apache-2.0

internal import GuestMemory
internal import LinuxSystem
public import MemoryImage

/// Which pages of a session are brought, and in which order: `PagerSession.makeReplayPlan`, then
/// the runs of a working set.
///
/// Pages that lie within a step of each other, 256 KiB, are brought together: bringing them one by
/// one costs several times as much, and all of them are wanted. For each GiB of 4 KiB pages it
/// takes up to 110 KiB, whatever the order.
public struct ReplayPlan: Sendable {
  /// Pages that one thread fills one after the other, but for those that nobody wants.
  struct Window {
    private let number: UInt32
    private let firstPage: UInt32
    private var pageCount: UInt32

    init(region: Int, pages: Range<Int>) {
      number = UInt32(region)
      firstPage = UInt32(pages.lowerBound)
      pageCount = UInt32(pages.count)
    }

    var region: Int { Int(number) }
    var pages: Range<Int> { Int(firstPage)..<Int(firstPage) + Int(pageCount) }

    /// With the pages of one that follows it.
    mutating func append(_ next: Window) { pageCount += next.pageCount }
  }

  /// Where a region lies. Apart from its pages: whoever looks at it holds no copy of them, and
  /// adding to them then copies nothing.
  private struct Extent {
    let sourceRegion: Int
    let sourceOffset: Int
    let pageSize: Int
    let pageCount: Int
    let stepLength: Int

    var stepCount: Int { (pageCount + stepLength - 1) / stepLength }

    func pages(ofStep step: Int) -> Range<Int> {
      step * stepLength..<min((step + 1) * stepLength, pageCount)
    }
  }

  private struct Part {
    let extent: Extent
    /// Whoever wants all of it has no need for them.
    var wanted = BlockSet()
    var steps = BlockSet()
  }

  private var parts: [Part]
  private let isAll: Bool
  /// In their order; of a plan that wants all they are not kept but calculated.
  private var windows: [Window] = []
  /// Of the pages that are wanted.
  private(set) var bytes = 0

  /// A plan without pages.
  ///
  /// - Parameter stepLength: pages of a region that are brought together.
  init(_ regions: [PagedRegion], stepLength: (PagedRegion) -> Int) {
    isAll = false
    parts = Self.parts(regions, stepLength)
  }

  /// All pages, in their order; windows of a step.
  init(all regions: [PagedRegion], stepLength: (PagedRegion) -> Int) {
    isAll = true
    parts = Self.parts(regions, stepLength)
    bytes = parts.reduce(0) { $0 + $1.extent.pageCount * $1.extent.pageSize }
  }

  private static func parts(
    _ regions: [PagedRegion], _ stepLength: (PagedRegion) -> Int
  ) -> [Part] {
    regions.map { region in
      Part(
        extent: Extent(
          sourceRegion: region.sourceRegion, sourceOffset: region.sourceOffset,
          pageSize: region.pageSize.bytes, pageCount: region.pageCount,
          stepLength: stepLength(region)))
    }
  }

  /// Whether there is nothing to bring.
  public var isEmpty: Bool { windowCount == 0 }

  /// How many windows there are.
  var windowCount: Int {
    isAll ? parts.reduce(0) { $0 + $1.extent.stepCount } : windows.count
  }

  /// A window, counted from 0.
  func window(_ index: Int) -> Window {
    guard isAll else { return windows[index] }
    var step = index
    var region = 0
    while step >= parts[region].extent.stepCount {
      step -= parts[region].extent.stepCount
      region += 1
    }
    return Window(region: region, pages: parts[region].extent.pages(ofStep: step))
  }

  /// Adds the pages of a run that the session has, where they are not there yet; the others are
  /// passed over.
  public mutating func add(_ run: WorkingSetRun) {
    let wanted = run.firstBlock * 4096..<(run.firstBlock + run.blockCount) * 4096
    for number in parts.indices where parts[number].extent.sourceRegion == run.region {
      let part = parts[number].extent
      let own = part.sourceOffset..<part.sourceOffset + part.pageCount * part.pageSize
      let common = wanted.clamped(to: own)
      guard !common.isEmpty else { continue }
      let first = (common.lowerBound - own.lowerBound) / part.pageSize
      let last = (common.upperBound - own.lowerBound + part.pageSize - 1) / part.pageSize
      for step in first / part.stepLength...(last - 1) / part.stepLength {
        let pages = part.pages(ofStep: step)
        add(pages.clamped(to: first..<last), number)
        guard !parts[number].steps.contains(step) else { continue }
        parts[number].steps.insert(step)
        windows.append(Window(region: number, pages: pages))
      }
    }
  }

  private mutating func add(_ pages: Range<Int>, _ number: Int) {
    let before = parts[number].wanted.count
    parts[number].wanted.insert(pages)
    bytes += (parts[number].wanted.count - before) * parts[number].extent.pageSize
  }

  /// The same with windows that follow each other as one, up to so many bytes.
  func joined(upTo limit: Int) -> ReplayPlan {
    var plan = self
    plan.windows = []
    for window in windows {
      if let last = plan.windows.last, last.region == window.region,
        last.pages.upperBound == window.pages.lowerBound,
        (last.pages.count + window.pages.count) * parts[last.region].extent.pageSize <= limit
      {
        plan.windows[plan.windows.count - 1].append(window)
      } else {
        plan.windows.append(window)
      }
    }
    return plan
  }

  /// The first pages in a window that are wanted and follow each other, from one on.
  func next(in window: Window, from page: Int) -> Range<Int>? {
    let rest = max(page, window.pages.lowerBound)..<max(page, window.pages.upperBound)
    guard !rest.isEmpty else { return nil }
    return isAll ? rest : parts[window.region].wanted.firstRun(in: rest)
  }

  /// Bytes of a window's pages that are wanted.
  func bytes(of window: Window) -> Int {
    let part = parts[window.region]
    return (isAll ? window.pages.count : part.wanted.count(in: window.pages)) * part.extent.pageSize
  }
}
