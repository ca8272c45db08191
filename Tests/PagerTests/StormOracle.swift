// SPDX-License-Identifier: Apache-2.0

import GuestMemory
import GuestMemoryModel
import LinuxSystem
import Pager
import TestSupport

/// A few pages that one thread at a time owns, and what they must read as.
///
/// What the kernel keeps and drops is the model's answer (`GuestMemoryModel`). The pager's part is
/// one rule: a missing page is the snapshot's until it was given up, and zero from then on. So
/// every read has one right answer, whatever happens to other pages meanwhile, and whoever fills
/// ahead.
///
/// Where the model cannot know is one case: MADV_DONTNEED of shared memory keeps what is in the
/// page cache, and whether an untouched page was brought there before is up to chance. Its next
/// read decides, and holds.
struct Plot: Sendable {
  /// What a page holds that is not there.
  private enum Origin { case snapshot, zero, either }

  /// Where the plot lies in its region.
  let pages: Range<Int>
  /// What a page of the snapshot begins with.
  private let snapshot: [UInt64]
  private var model: Model
  private var origins: [Origin]
  /// What the untouched rest of a page is.
  private var isSnapshots: [Bool]
  private var isGone: [Bool]

  init(_ kind: MemoryCase, pages: Range<Int>, snapshot: (Int) -> UInt64) {
    let memory: ModelMemory =
      switch kind.backing {
      case .anonymous: .anonymous
      case .memfd: .tmpfsShared
      default: .hugetlb
      }
    var setup = Setup(memory, kernel: .linux6_18, objectPages: pages.count, pagesBeyondEnd: 0)
    setup.mappings = [MappingSetup(isPrivate: memory == .anonymous)]
    model = Model(setup)
    let modes: ModelModes = kind.mode == .missing ? .missing : [.missing, .minor]
    _ = model.apply(.register(Span(0, 0, pages.count), modes))
    self.pages = pages
    self.snapshot = pages.map(snapshot)
    origins = Array(repeating: .snapshot, count: pages.count)
    isSnapshots = Array(repeating: true, count: pages.count)
    isGone = Array(repeating: false, count: pages.count)
  }

  /// The pages that are still mapped.
  var mapped: [Int] { pages.filter { !isGone[$0 - pages.lowerBound] } }

  /// The part of some pages, from the first one on, that is still mapped.
  func mapped(of wanted: Range<Int>) -> Range<Int> {
    let end = wanted.first { isGone[$0 - pages.lowerBound] }
    return wanted.lowerBound..<(end ?? wanted.upperBound)
  }

  /// The right answer to a read of a page's first word.
  ///
  /// - Parameter seen: what the read gave; decides where both answers are right.
  mutating func read(_ page: Int, seen: UInt64) -> UInt64 {
    touch(page - pages.lowerBound, .read, seen: seen)
  }

  /// Whether the words of a page that nobody wrote are the snapshot's, else zero. The page was
  /// read or written before.
  func restIsSnapshot(_ page: Int) -> Bool { isSnapshots[page - pages.lowerBound] }

  /// A page's first word is written, after a read.
  mutating func write(_ value: UInt64, _ page: Int) {
    _ = touch(page - pages.lowerBound, .write(value), seen: 0)
  }

  /// MADV_DONTNEED.
  mutating func drop(_ dropped: Range<Int>) {
    let first = dropped.lowerBound - pages.lowerBound
    let span = Span(0, first, dropped.count)
    for page in span.pages {
      switch (model.setup.memory, origins[page]) {
      case (.anonymous, _): origins[page] = .zero
      // What is in the model's cache is not asked for its origin.
      case (_, .snapshot) where model.cache[page] == .absent: origins[page] = .either
      default: break
      }
    }
    _ = model.apply(.dontNeed(span))
  }

  /// MADV_REMOVE of shared memory.
  mutating func remove(_ removed: Range<Int>) {
    let first = removed.lowerBound - pages.lowerBound
    _ = model.apply(.punchHole(first: first, count: removed.count))
    for page in first..<first + removed.count { origins[page] = .zero }
  }

  /// munmap(2): never to be touched again.
  mutating func unmap(_ unmapped: Range<Int>) {
    for page in unmapped { isGone[page - pages.lowerBound] = true }
  }

  /// A touch that is resolved as docs/pager.md has it.
  private mutating func touch(_ page: Int, _ access: Access, seen: UInt64) -> UInt64 {
    var outcome = model.apply(.touch(mapping: 0, page: page, access)).outcome
    if case .waits(let event) = outcome {
      let step: GuestMemoryModel.Operation
      if event.flags.contains(.minor) {
        step = .continue(Span(0, page))
      } else {
        if origins[page] == .either { origins[page] = seen == 0 ? .zero : .snapshot }
        isSnapshots[page] = origins[page] == .snapshot
        step = .copy(Span(0, page), tag: isSnapshots[page] ? snapshot[page] : 0)
      }
      outcome = model.apply(step).resumed.first ?? outcome
    }
    guard case .value(let value) = outcome else {
      preconditionFailure("the model has no value: \(outcome)")
    }
    return value
  }
}
