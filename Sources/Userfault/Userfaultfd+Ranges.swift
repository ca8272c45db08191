// SPDX-License-Identifier: Apache-2.0

public import LinuxSystem
public import SystemPackage

/// Why memory that somebody else registered cannot be served as it was described.
public enum RangeDefect: Hashable, Sendable {
  /// It is not registered: a touch would read zeros, and nobody would be told.
  case notRegistered(HostAddress)
  /// The process has no such addresses.
  case outside(HostAddress)
  /// Its pages are smaller than it was said.
  case smallerPages(HostAddress)
  /// Its pages are larger than it was said.
  case largerPages(HostAddress)
  /// It is registered for write protection, and its faults are not resolved by the kernel
  /// (UFFD_FEATURE_WP_ASYNC).
  case writeProtected(HostAddress)
  /// The process, or its address space, is gone.
  case processGone
}

// The kernel is asked by UFFDIO_COPY from where nothing can be read. It looks at the range first
// (mm/userfaultfd.c, mfill_atomic): ENOENT when it is not inside of one registered mapping, EINVAL
// when pages of hugetlbfs are larger than the length, or for a write-protected copy of a range
// that is not registered for that; then it fails to read, EFAULT, or finds a page, EEXIST.
// Nothing comes of it in any case.
extension Userfaultfd {
  /// How often the kernel is asked at most about one range; then its first and last page suffice.
  static let rangeQuestions = 256

  /// Looks whether all of a range is registered and has pages of a size; `nil` when it is so, and
  /// while a mapping of the process is changing (EAGAIN), when the kernel does not say.
  ///
  /// Nothing is changed. Throws `noMemory` when no address space is left for the question.
  ///
  /// - Parameter range: whole pages of that size.
  public borrowing func defect(
    of range: HostRange, pageSize: PageSize
  ) throws(Errno) -> RangeDefect? {
    let question = RangeQuestion(source: try Mapping(inaccessible: 4096))
    var left = Self.rangeQuestions
    var position = range.start
    while position < range.end {
      left -= 3
      switch question.look(at: position, pageSize: pageSize, in: self) {
      case .right: break
      case .unknown: return nil
      case .defect(let defect): return defect
      }
      if left <= 0 {
        // Too many mappings to ask for each.
        let last = range.end.advanced(by: -pageSize.bytes)
        if case .defect(let defect) = question.look(at: last, pageSize: pageSize, in: self) {
          return defect
        }
        return nil
      }
      let rest = HostRange(start: position, length: position.distance(to: range.end))
      position = position.advanced(
        by: question.mappedLength(rest, pageSize: pageSize, in: self, &left))
    }
    return nil
  }
}

/// Copies that fail.
private struct RangeQuestion: ~Copyable {
  /// Cannot be read.
  let source: Mapping

  enum Answer {
    case right, unknown
    case defect(RangeDefect)
  }

  private borrowing func ask(
    _ start: HostAddress, _ length: Int, writeProtected: Bool = false,
    in userfaultfd: borrowing Userfaultfd
  ) -> Resolution.Obstacle? {
    // SAFETY: the kernel finds that the source cannot be read; beyond it, it does not get.
    unsafe userfaultfd.copy(
      from: source.pointer, to: start, length: length, writeProtected: writeProtected,
      wakes: false
    ).obstacle
  }

  /// Looks at the mapping that has an address.
  borrowing func look(
    at start: HostAddress, pageSize: PageSize, in userfaultfd: borrowing Userfaultfd
  ) -> Answer {
    switch ask(start, 4096, in: userfaultfd) {
    case .notRegistered: return .defect(.notRegistered(start))
    case .processGone: return .defect(.processGone)
    case .mappingChanging: return .unknown
    case .failed(.invalidArgument):
      let page = HostRange(start: start, length: 4096)
      guard (try? userfaultfd.wake(page)) != nil else { return .defect(.outside(start)) }
      guard pageSize != .size4KiB,
        ask(start, pageSize.bytes, in: userfaultfd) != .failed(.invalidArgument)
      else { return .defect(.largerPages(start)) }
    default:
      guard pageSize == .size4KiB else { return .defect(.smallerPages(start)) }
    }
    if !userfaultfd.features.contains(.writeProtectAsync) {
      switch ask(start, pageSize.bytes, writeProtected: true, in: userfaultfd) {
      case .absent, .alreadyPresent: return .defect(.writeProtected(start))
      default: break
      }
    }
    return .right
  }

  /// How much of a range, from its start on, is one mapping; at least a page.
  borrowing func mappedLength(
    _ range: HostRange, pageSize: PageSize, in userfaultfd: borrowing Userfaultfd,
    _ left: inout Int
  ) -> Int {
    // The source has to end within the address space, too.
    let limit = HostAddress(1 << 47 - 4096)
    let room = max(pageSize.bytes, source.range.start.distance(to: limit))
    // Less than whole huge pages: so none is allocated to be thrown away.
    let cut = pageSize == .size4KiB ? 0 : 4096
    var (known, over) = (1, min(range.length, room) / pageSize.bytes + 1)
    var next = over - 1
    while known + 1 < over, left > 0 {
      left -= 1
      if ask(range.start, next * pageSize.bytes - cut, in: userfaultfd) == .notRegistered {
        over = next
      } else {
        known = next
      }
      next = known + (over - known) / 2
    }
    return known * pageSize.bytes
  }
}
