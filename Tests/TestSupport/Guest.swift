// SPDX-License-Identifier: Apache-2.0

import CTestSupport
package import GuestMemory
package import LinuxSystem
package import Pager
package import Userfault

/// Reads the first word of a page from a thread that may fault and wait.
package func load(_ range: HostRange, offset: Int) -> UInt64 {
  // SAFETY: the caller keeps the mapping alive.
  unsafe UnsafeRawPointer(bitPattern: UInt(range.start.rawValue) + UInt(offset))
    .unsafelyUnwrapped.load(as: UInt64.self)
}

/// Writes the first word of a page.
package func store(_ value: UInt64, _ range: HostRange, offset: Int) {
  // SAFETY: the caller keeps the mapping alive.
  unsafe UnsafeMutableRawPointer(bitPattern: UInt(range.start.rawValue) + UInt(offset))
    .unsafelyUnwrapped.storeBytes(of: value, as: UInt64.self)
}

/// What a read of possibly poisoned memory gave.
package enum GuardedValue: Equatable, Sendable {
  case value(UInt64)
  case busError
}

/// Reads 8 bytes and survives a SIGBUS.
package func guardedLoad(_ range: HostRange, offset: Int) -> GuardedValue {
  var value: UInt64 = 0
  let code = unsafe ctest_guarded_load(UInt(range.start.rawValue) + UInt(offset), &value)
  return code == 0 ? .value(value) : .busError
}

/// Guest memory of this process with a session that serves it.
package final class ServedMemory: Sendable {
  package let memory: GuestMemoryObject
  package let region: PagedRegion
  package let source: PatternSource
  package let session: PagerSession<PatternSource>

  package convenience init(
    _ kind: MemoryCase, pages: Int, source: PatternSource = PatternSource(), threads: Int = 2,
    without features: UserfaultFeatures = [], faultAround: FaultAround = .adaptive,
    pool: PagerPool? = nil, start: Bool = true
  ) throws {
    try self.init(
      GuestMemoryObject(backing: kind.backing, length: pages * kind.backing.pageSize.bytes),
      mode: kind.mode, source: source, threads: threads, without: features,
      faultAround: faultAround, pool: pool, start: start)
  }

  /// The same over memory that a test made, such as some of a `SmallHugePagePool`.
  package init(
    _ memory: consuming GuestMemoryObject, mode: ResolutionMode,
    source: PatternSource = PatternSource(), threads: Int = 2,
    without features: UserfaultFeatures = [], faultAround: FaultAround = .adaptive,
    pool: PagerPool? = nil, start: Bool = true
  ) throws {
    region = try PagedRegion(memory, mode: mode)
    self.memory = memory
    self.source = source
    let wanted = PagerSession<PatternSource>.features.wanted.subtracting(features)
    var options = PagerOptions(faultThreads: threads)
    options.faultAround = faultAround
    session = try PagerSession(
      userfaultfd: try Userfaultfd(wanting: wanted), regions: [region], source: source,
      options: options)
    guard start else { return }
    if let pool { try session.start(in: pool) } else { try session.start() }
  }

  deinit { session.release() }

  package var range: HostRange { memory.range }
  package var pageBytes: Int { region.pageSize.bytes }

  /// Number of 4 KiB blocks.
  package var blocks: Int { range.length / 4096 }

  /// Touches blocks in the given order and returns those with wrong content.
  package func wrongBlocks(_ order: some Sequence<Int>) -> [Int] {
    order.filter { block in
      let expected = source.expected(block: block)
      return load(range, offset: block * 4096) != expected
        || load(range, offset: block * 4096 + 4088) != expected
    }
  }
}

/// Runs a body in several threads and waits for all of them.
package func inThreads(_ count: Int, _ body: @escaping @Sendable (Int) -> Void) throws {
  let gate = ThreadGate()
  var threads: [ThreadHandle] = []
  for index in 0..<count {
    threads.append(
      ThreadHandle(
        try NamedThread(name: "guest\(index)") {
          gate.wait()
          body(index)
        }))
  }
  gate.open()
  for thread in threads { thread.join() }
}
