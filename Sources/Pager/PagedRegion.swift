// SPDX-License-Identifier: Apache-2.0

public import GuestMemory
public import LinuxSystem
public import SystemPackage
internal import Userfault

/// How absent pages of a region are filled.
public enum ResolutionMode: String, Sendable, CaseIterable {
  /// MISSING: UFFDIO_COPY fills and maps in one step.
  case missing
  /// MISSING|MINOR: the page cache is filled first, then UFFDIO_CONTINUE maps. Only
  /// for shared memory. (MINOR alone would let the kernel fill absent pages with
  /// zeros, silently.)
  case minor

  var registration: RegistrationModes { self == .missing ? .missing : [.missing, .minor] }
}

/// A range of guest memory that a session serves, and what is known of its pages.
///
/// It outlives sessions: a handler that is stopped and started again goes on with
/// the same page states.
public final class PagedRegion: Sendable {
  /// Where it lies in the process that is served.
  public let host: HostRange
  /// Where the guest sees it.
  public let guestAddress: GuestAddress
  /// The unit of a fault.
  public let pageSize: PageSize
  /// Which region of the source, and how many bytes into it.
  public let sourceRegion: Int
  /// Bytes into the source's region; a multiple of 4 KiB.
  public let sourceOffset: Int
  /// How absent pages are filled.
  public let mode: ResolutionMode

  /// The state of every page.
  public let states: PageStateTable
  let cache: PageCacheWriter?
  /// What it has of a cache of clean pages; `nil` when it is no clone.
  let share: CloneShare?
  /// Where stage-2 faults put their pages; `nil` where there are none.
  let populator: PageCacheWriter?
  /// Parts of pages that the guest gave up before they were filled; `nil` where an event is of
  /// whole pages at least.
  let holes: BlockHoles?

  /// The whole of a memory object of this process.
  ///
  /// `invalidArgument` when `.minor` is asked for on anonymous memory.
  /// - Parameter stageTwo: vCPUs take their pages from a guest_memfd without going through
  ///   the mapping, and ask a `StageTwoResolver`. A user fault can then be on a page that
  ///   is in the page cache, so the range is registered MISSING|MINOR in either mode.
  public init(
    _ memory: borrowing GuestMemoryObject, mode: ResolutionMode, stageTwo: Bool = false,
    guestAddress: GuestAddress = GuestAddress(0), sourceRegion: Int = 0, sourceOffset: Int = 0
  ) throws(Errno) {
    let states = try PageStateTable(pageCount: memory.range.length / memory.backing.pageSize.bytes)
    self.host = memory.range
    self.guestAddress = guestAddress
    self.pageSize = memory.backing.pageSize
    self.sourceRegion = sourceRegion
    self.sourceOffset = sourceOffset
    self.mode = mode
    holes = try Self.makeHoles(pages: states.pageCount, pageSize)
    self.states = states
    share = nil
    switch mode {
    case .missing: cache = nil
    case .minor: cache = try memory.makePageCacheWriter()
    }
    populator = stageTwo ? try memory.makePageCacheWriter() : nil
  }

  /// A range of another process: filled by UFFDIO_COPY, or, if it maps a memory file that came
  /// from there, through that file and mapped by UFFDIO_CONTINUE (`.minor`).
  ///
  /// - Parameter memory: the file, and where in it the range begins.
  public init(
    host: HostRange, pageSize: PageSize, guestAddress: GuestAddress, sourceRegion: Int = 0,
    sourceOffset: Int = 0, memory: (file: HandedMemoryFile, offset: Int)? = nil
  ) throws(Errno) {
    guard host.length > 0, pageSize.divides(host.length) else { throw .invalidArgument }
    let writer = try memory.map { (memory) throws(Errno) in
      guard memory.file.pageSize == pageSize else { throw .invalidArgument }
      return PageCacheWriter(memory.file, offset: memory.offset)
    }
    states = try PageStateTable(pageCount: host.length / pageSize.bytes)
    self.host = host
    self.guestAddress = guestAddress
    self.pageSize = pageSize
    self.sourceRegion = sourceRegion
    self.sourceOffset = sourceOffset
    mode = memory == nil ? .missing : .minor
    holes = try Self.makeHoles(pages: states.pageCount, pageSize)
    cache = writer
    share = nil
    populator = nil
  }

  /// A clone's private mapping of a whole cache of clean pages. Its userfaultfd needs REMOVE
  /// events: what the guest gives back has to be told from what the kernel unmaps by itself.
  ///
  /// - Parameter host: where the clone has it mapped (`SharedPageCache.makeMapping`).
  public init(
    cloneOf cache: SharedPageCache, host: HostRange, guestAddress: GuestAddress = GuestAddress(0),
    sourceRegion: Int = 0
  ) throws(Errno) {
    guard host.length == cache.length else { throw .invalidArgument }
    states = try PageStateTable(pageCount: host.length / cache.pageSize.bytes)
    share = try CloneShare(cache)
    self.host = host
    self.guestAddress = guestAddress
    pageSize = cache.pageSize
    self.sourceRegion = sourceRegion
    sourceOffset = 0
    mode = .missing
    self.cache = nil
    populator = nil
    // The kernel gives up whole pages of a private mapping only (mm/madvise.c,
    // madvise_dontneed_free_valid_vma).
    holes = nil
  }

  private static func makeHoles(pages: Int, _ pageSize: PageSize) throws(Errno) -> BlockHoles? {
    pageSize == .size4KiB ? nil : try BlockHoles(pages: pages, pageSize: pageSize)
  }

  var registration: RegistrationModes {
    switch populator {
    case .none: share == nil ? mode.registration : [.missing, .minor]
    case .some: [.missing, .minor]
    }
  }

  // MARK: - Geometry

  /// Pages in the region.
  public var pageCount: Int { states.pageCount }

  /// The page that holds an address inside the region.
  func page(of address: HostAddress) -> Int {
    host.start.distance(to: address) / pageSize.bytes
  }

  /// The host addresses of some pages.
  func range(of first: Int, count: Int = 1) -> HostRange {
    HostRange(
      start: host.start.advanced(by: first * pageSize.bytes), length: count * pageSize.bytes)
  }

  /// The pages that a range of addresses touches, clipped to the region.
  func pages(in range: HostRange) -> Range<Int> {
    let start = max(range.start, host.start)
    let end = min(range.end, host.end)
    guard start < end else { return 0..<0 }
    let last = (host.start.distance(to: end) + pageSize.bytes - 1) / pageSize.bytes
    return page(of: start)..<last
  }

  /// The pages that lie inside of a range of addresses as a whole.
  func wholePages(in range: HostRange) -> Range<Int> {
    let start = max(range.start, host.start)
    let end = min(range.end, host.end)
    guard start < end else { return 0..<0 }
    let first = (host.start.distance(to: start) + pageSize.bytes - 1) / pageSize.bytes
    return first..<max(first, host.start.distance(to: end) / pageSize.bytes)
  }

  /// Notes what the guest gave up. The caller holds the gate alone.
  ///
  /// Of a page of which only a part is given up the rest keeps its content: what is there already
  /// is the kernel's to change, what is not filled yet gets its zeros when it is.
  func remove(_ range: HostRange) {
    let whole = wholePages(in: range)
    states.take(.remove, whole)
    share?.release(whole)
    guard let holes else { return }
    let touched = pages(in: range)
    guard let first = touched.first, let last = touched.last else { return }
    // Only the two at its ends can be covered in part.
    remove(range, ofPage: first, holes, whole)
    if last != first { remove(range, ofPage: last, holes, whole) }
  }

  private func remove(
    _ range: HostRange, ofPage page: Int, _ holes: BlockHoles, _ whole: Range<Int>
  ) {
    let state = states.load(page)
    guard !whole.contains(page), !state.isSettled || state == .withheld else { return }
    let start = host.start.advanced(by: page * pageSize.bytes)
    let blocks = start.distance(to: range.start) / 4096..<start.distance(to: range.end) / 4096
    if holes.add(blocks, ofPage: page) { states.take(.remove, page) }
  }

  /// Notes what is not mapped any more, also of pages of which that is a part: what is left of one
  /// can be had no more. The kernel unmaps whole pages only. The caller holds the gate alone.
  func unmap(_ range: HostRange) {
    let pages = pages(in: range)
    states.take(.unmap, pages)
    share?.release(pages)
  }
}
