// SPDX-License-Identifier: Apache-2.0

internal import LinuxSystem
public import SystemPackage

extension GuestMemoryObject {
  /// The byte ranges that may hold something other than zeros, in order.
  ///
  /// Only for memory that nobody fills on demand: under userfaultfd an absent page is
  /// not a zero page. Where the kernel cannot tell, the answer is everything.
  public borrowing func populatedRanges() throws(Errno) -> [Range<Int>] {
    switch file {
    case .none:
      let start = range.start
      do throws(Errno) {
        return try PageMap().populatedRanges(in: range).map { part in
          let first = start.distance(to: part.start)
          return first..<(first + part.length)
        }
      } catch {
        return [0..<range.length]
      }
    case .some where backing == .guestMemfd:
      // It has no SEEK_DATA, and its page tables tell nothing of what vCPUs have touched.
      return [0..<range.length]
    case .some(let file):
      // hugetlbfs has no SEEK_DATA of its own: it says that all is data.
      var ranges: [Range<Int>] = []
      var position = 0
      while let data = try file.descriptor.nextData(from: position), data < range.length {
        let hole = try file.descriptor.nextHole(from: data) ?? range.length
        ranges.append(data..<min(hole, range.length))
        position = hole
      }
      return ranges
    }
  }
}
