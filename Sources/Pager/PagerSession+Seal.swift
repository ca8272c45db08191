// SPDX-License-Identifier: Apache-2.0

internal import GuestMemory
internal import LinuxSystem
internal import SystemPackage
internal import Userfault

extension PagerSession {
  /// Makes a touch of each page without content a memory error (UFFDIO_POISON), so that none of
  /// them turns into zeros when the session lets go of memory that is in use. What the guest gave
  /// back is zero as before. Pages that are being filled come yet.
  ///
  /// Call it while the session serves, and `release` after it. It takes about 50 ns a page, and
  /// nothing for memory that is gone.
  ///
  /// - Parameter isFilled: all that has data was filled (`populate`, `startFill`), so what is
  ///   absent is zero: only pages without right content are meant.
  /// - Returns: `false` where the kernel cannot (before Linux 6.6), or a page is left: keep the
  ///   session, and with it the userfaultfd, until the process has ended.
  public func seal(isFilled: Bool = false) -> Bool {
    guard memory.userfaultfd.features.contains(.poison) else { return false }
    var isSealed = true
    for region in regions {
      var page = 0
      while page < region.pageCount {
        let claimed =
          isFilled ? 0 : region.states.claim(from: page, limit: Self.sealedAtOnce)
        if claimed > 0 {
          isSealed = seal(page..<page + claimed, region) && isSealed
          page += claimed
        } else {
          // One that is known to be bad and was not poisoned is poisoned now.
          if region.states.load(page) == .poisoned, !canPoison {
            isSealed = seal(page..<page + 1, region) && isSealed
          }
          page += 1
        }
      }
    }
    return isSealed
  }

  /// Has clones go on without the session. A page that nobody watches and that is not mapped is
  /// the cache's: so what they gave back is made zeros in place, and the caches take no page out
  /// any more, for as long as they live. Nothing is done where no region is a clone's.
  ///
  /// Call it while the session serves, then `seal`, then `release`. What a clone gives back later
  /// has the image's content when it is touched again.
  ///
  /// - Returns: `false` when a page is left: keep the session until the process has ended.
  public func detachClones() -> Bool {
    let clones = regions.filter { $0.share != nil }
    guard !clones.isEmpty else { return true }
    for region in clones { region.share?.cache.retire() }
    let bench: SendableBench
    do throws(Errno) {
      bench = try SendableBench(length: benchLength)
    } catch {
      return false
    }
    return clones.allSatisfy { putZeros($0, bench.buffer) }
  }

  /// Puts zeros where a clone gave pages back and has not touched them since.
  private func putZeros(_ region: PagedRegion, _ bench: borrowing Workbench) -> Bool {
    var (page, attempts) = (0, 0)
    while page < region.pageCount {
      // Under the gate: an event that was read is in the states.
      let resolution = gate.read { () -> Resolution? in
        let end = min(page + Self.sealedAtOnce, region.pageCount)
        while page < end, region.states.load(page) != .removed { page += 1 }
        var count = 0
        while page + count < end, region.states.load(page + count) == .removed { count += 1 }
        guard count > 0 else { return nil }
        return region.pageSize == .size4KiB
          ? memory.zeropage(region.range(of: page, count: count))
          // hugetlbfs has no ZEROPAGE. SAFETY: the bench is as long as a page, and new: zeros.
          : unsafe memory.copy(from: bench.pointer, to: region.range(of: page))
      }
      guard let resolution else { continue }
      page += resolution.bytesDone / region.pageSize.bytes
      switch resolution.obstacle {
      case nil, .partial: break
      // It was touched.
      case .alreadyPresent: page += 1
      // It was unmapped.
      case .notRegistered: page += 1
      case .processGone: return true
      case .mappingChanging where attempts < 10_000:
        attempts += 1
        Pause.microseconds(100)
      default: return false
      }
    }
    return true
  }

  private static var sealedAtOnce: Int { 512 }

  /// Poisons pages that are claimed, or have no right content.
  private func seal(_ pages: Range<Int>, _ region: PagedRegion) -> Bool {
    var first = pages.lowerBound
    var attempts = 0
    while first < pages.upperBound {
      let range = region.range(of: first, count: pages.upperBound - first)
      let resolution = gate.read {
        let resolution = memory.poison(range)
        let done = resolution.bytesDone / region.pageSize.bytes
        region.states.fill(first..<first + done, with: .poisoned)
        first += done
        return resolution
      }
      switch resolution.obstacle {
      case nil, .partial: break
      case .alreadyPresent:
        // There all the same, such as a page of zeros that the kernel put there.
        region.states.store(first, .present)
        first += 1
      case .notRegistered, .processGone: return true
      case .mappingChanging where attempts < 10_000:
        attempts += 1
        Pause.microseconds(100)
      default: return false
      }
    }
    return true
  }
}
