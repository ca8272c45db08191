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
}
