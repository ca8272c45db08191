// SPDX-License-Identifier: Apache-2.0

/// How many neighbours a fault brings along.
public enum FaultAround: Hashable, Sendable {
  /// None: each page comes when it is touched.
  case off
  /// What the source has at no extra cost, such as the rest of a compressed chunk; and where
  /// faults go upwards page by page, twice as many each time, up to so many bytes.
  case upTo(bytes: Int)

  /// Up to 1 MiB.
  public static let adaptive = FaultAround.upTo(bytes: 1 << 20)

  var maximum: Int {
    switch self {
    case .off: 0
    case .upTo(let bytes): bytes
    }
  }
}

/// What one fault thread has seen of a guest's way through its memory: a few streams that go
/// upwards, such as one for each vCPU. Allocates nothing.
struct AccessStreams {
  private struct Stream {
    /// Where the next fault of this stream is expected; -1 for none.
    var next = -1
    /// Pages that came last time.
    var window = 1
    var usedAt: UInt64 = 0
  }

  private var streams: (Stream, Stream, Stream, Stream) = (
    Stream(), Stream(), Stream(), Stream()
  )
  private var clock: UInt64 = 0

  /// Notes a fault, and says how many pages from it on are worth having.
  ///
  /// - Parameters:
  ///   - page: a number that tells pages of all regions apart and follows their order.
  ///   - limit: pages, at least 1.
  ///   - slack: pages that may have come by themselves, such as the rest of a chunk.
  mutating func window(at page: Int, limit: Int, slack: Int) -> Int {
    clock &+= 1
    var oldest = 0
    var age = UInt64.max
    for index in 0..<4 {
      let stream = self[index]
      if stream.next >= 0, page >= stream.next, page - stream.next <= slack {
        let window = min(limit, stream.window * 2)
        self[index] = Stream(next: page + window, window: window, usedAt: clock)
        return window
      }
      if stream.usedAt < age { (oldest, age) = (index, stream.usedAt) }
    }
    self[oldest] = Stream(next: page + 1, window: 1, usedAt: clock)
    return 1
  }

  private subscript(index: Int) -> Stream {
    get {
      switch index {
      case 0: streams.0
      case 1: streams.1
      case 2: streams.2
      default: streams.3
      }
    }
    set {
      switch index {
      case 0: streams.0 = newValue
      case 1: streams.1 = newValue
      case 2: streams.2 = newValue
      default: streams.3 = newValue
      }
    }
  }
}
