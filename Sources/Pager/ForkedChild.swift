// SPDX-License-Identifier: Apache-2.0

internal import LinuxSystem
internal import Synchronization
internal import SystemPackage
internal import Userfault

/// A child that the guest's process forked: it has the memory too, and waits in its own
/// userfaultfd where a page is absent.
///
/// What is to be in such a page cannot be told for certain: whether the child shares the memory
/// is known only to it. So it is told: a touch is a memory error, and where the kernel has no
/// UFFDIO_POISON it waits. Closing the descriptor would turn its absent pages into zeros. A
/// child that only goes on to execve(2), as VMMs' helpers do, touches none.
///
/// One thread uses it.
final class ForkedChild {
  /// For the thread that watches it.
  let number: UInt64
  private let memory: WatchedMemory
  private let regions: [PagedRegion]
  /// The next page that is to be sealed: the region's number, and bytes from its start.
  private var next: (region: Int, offset: Int) = (0, 0)
  /// Steps of one page that are left, where pieces are not registered as a whole.
  private var singleSteps = 0
  private var attempts = 0
  /// Its absent pages become memory errors, and then nobody needs to watch it.
  var isSealing = false
  /// The kernel could not.
  private(set) var isUnsealable = false

  /// What became of a step.
  enum Step {
    case goesOn
    /// An event is to be read first, or there is no memory now.
    case waits
    /// No page is left that could turn into zeros, or the memory is gone.
    case done
    /// The kernel cannot: it stays as it is.
    case impossible
  }

  /// What came of reading its events.
  enum Reading { case done, noDescriptor, failed }

  /// - Parameter memory: the child's.
  init(_ number: UInt64, _ memory: WatchedMemory, regions: [PagedRegion]) {
    self.number = number
    isUnsealable = !memory.userfaultfd.features.contains(.poison)
    self.memory = memory
    self.regions = regions
  }

  var descriptor: CInt { memory.userfaultfd.descriptor.rawValue }
  /// Nothing else tells of its end.
  var hasMemory: Bool { memory.userfaultfd.hasAddressSpace }

  // MARK: - Faults

  /// Answers what there is.
  ///
  /// - Parameter adopt: gets the descriptor of a child that this one forked, and its memory now.
  func answer(
    _ events: inout EventBuffer, adopt: (consuming OwnedDescriptor, WatchedMemory) -> Void
  ) -> Reading {
    do throws(Errno) {
      _ = try events.read(from: memory.userfaultfd)
    } catch {
      return error.isDescriptorShortage ? .noDescriptor : .failed
    }
    while let event = events.pop() {
      switch consume event {
      case .pageFault(let fault): refuse(fault)
      case .fork(let child): adopt(child, memory)
      case .remap(let from, let to, let length):
        // In so many pieces that nobody knows where a page is: it is not let go of then.
        if memory.move(from: from, to: to, length: length, regions: regions) == nil {
          (isUnsealable, isSealing) = (true, false)
        }
      default: break
      }
    }
    return .done
  }

  private func refuse(_ fault: PageFault) {
    guard memory.userfaultfd.features.contains(.poison) else { return }
    for size in [PageSize.size4KiB, .size2MiB, .size1GiB] {
      let start = fault.address.rawValue & ~UInt64(size.bytes - 1)
      let page = HostRange(start: HostAddress(start), length: size.bytes)
      let resolution = memory.userfaultfd.poison(page)
      // A smaller unit than that of the memory is refused.
      if case .failed(.invalidArgument) = resolution.obstacle { continue }
      // Faults anew where an event stands before it.
      if resolution.obstacle != nil { try? memory.userfaultfd.wake(page) }
      return
    }
  }

  // MARK: - Sealing

  /// Seals all of it, where nobody answers its faults: 5 s at most. One that cannot be sealed is kept
  /// as long as this process lives, so that what it touches waits and is not zero.
  func sealWhole() {
    let deadline = MonotonicClock.nanoseconds &+ 5_000_000_000
    var events = EventBuffer()
    while MonotonicClock.nanoseconds < deadline {
      switch seal() {
      case .done: return
      case .goesOn: continue
      case .impossible: return keptMemory.withLock { $0.append(memory) }
      case .waits:
        // A child of its own is not sealed but kept: what it touches waits.
        _ = answer(&events) { child, _ in _ = child.release() }
        Pause.microseconds(1000)
      }
    }
    keptMemory.withLock { $0.append(memory) }
  }

  /// Makes a touch of the next pages that are absent a memory error.
  func seal() -> Step {
    let step = sealPiece()
    if case .impossible = step { (isUnsealable, isSealing) = (true, false) }
    return step
  }

  private func sealPiece() -> Step {
    guard next.region < regions.count else { return .done }
    let region = regions[next.region]
    let left = region.host.length - next.offset
    guard left > 0 else {
      next = (next.region + 1, 0)
      return .goesOn
    }
    let page = region.pageSize.bytes
    let length = singleSteps > 0 ? page : min(left, max(page, Self.stepLength))
    let resolution = memory.poison(
      HostRange(start: region.host.start.advanced(by: next.offset), length: length))
    next.offset += resolution.bytesDone
    switch resolution.obstacle {
    case nil, .partial: break
    case .notRegistered where length > page:
      // A part of it is not there any more.
      singleSteps = Self.stepLength / page + 1
      return .goesOn
    // A page is there, or nothing is.
    case .alreadyPresent, .notRegistered, .absent: next.offset += page
    case .processGone: return .done
    case .mappingChanging: return .waits
    case .failed(.noMemory):
      attempts += 1
      return attempts < Self.attemptLimit ? .waits : .impossible
    case .failed: return .impossible
    }
    singleSteps = max(0, singleSteps - 1)
    attempts = 0
    return .goesOn
  }

  private static var stepLength: Int { 2 << 20 }
  private static var attemptLimit: Int { 1000 }
}

/// Of children that could not be sealed.
private let keptMemory = Mutex<[WatchedMemory]>([])
