// SPDX-License-Identifier: Apache-2.0

internal import LinuxSystem

/// The last few pages that may be there or not: hugetlbfs says of both that they are
/// (`Finding.shortage`). Mostly the page is there, and its fault was one of several that were raised
/// at the same time; whoever faults on it again soon does not have it.
struct DoubtfulPages {
  private var pages = InlineArray<8, HostAddress>(repeating: HostAddress(0))
  private var times = InlineArray<8, UInt64>(repeating: 0)
  private var next = 0
  /// 50 ms.
  private static var memory: UInt64 { 50_000_000 }

  /// Notes a page, and whether it was noted a moment ago.
  mutating func isRepeated(_ page: HostAddress, at now: UInt64) -> Bool {
    for index in pages.indices where pages[index] == page {
      defer { times[index] = now }
      return now &- times[index] < Self.memory
    }
    pages[next] = page
    times[next] = now
    next = (next + 1) % pages.count
    return false
  }
}
