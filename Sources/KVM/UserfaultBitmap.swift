// SPDX-License-Identifier: Apache-2.0

public import LinuxSystem
internal import Synchronization
public import SystemPackage

/// Which 4 KiB pages of a memory slot a vCPU may not have yet: KVM reads it at each stage-2
/// fault (kernel/README.md, "Stage-2 userfaults").
///
/// Provide a page, `clear` its bit, then run the vCPU again. Setting the bit of a page that
/// the guest has already mapped has no effect. All methods are safe from any thread.
@safe
public final class UserfaultBitmap: Sendable {
  /// Pages that it has bits for.
  public let pageCount: Int
  // SAFETY: all access to the words is atomic; the mapping lives as long as this object.
  private let memory: Mapping
  private nonisolated(unsafe) let words: UnsafeMutablePointer<Atomic<UInt64>>

  /// A bitmap with all bits set, or none.
  public init(pageCount: Int, allSet: Bool) throws(Errno) {
    let bytes = (pageCount + 63) / 64 * 8
    let memory = try Mapping(anonymous: (bytes + 4095) & ~4095)
    if allSet {
      // SAFETY: the mapping has room for the words, and nobody else has it yet.
      unsafe memory.pointer.initializeMemory(as: UInt8.self, repeating: 0xFF, count: bytes)
    }
    // SAFETY: Atomic<UInt64> has the size and layout of UInt64.
    unsafe words = memory.pointer.assumingMemoryBound(to: Atomic<UInt64>.self)
    self.memory = memory
    self.pageCount = pageCount
  }

  /// Where KVM finds it.
  public var address: HostAddress { memory.range.start }

  /// Lets vCPUs have a page. What was done to the page before is visible to them.
  public func clear(_ page: Int) {
    precondition(page >= 0 && page < pageCount)
    unsafe words[page / 64].bitwiseAnd(~Self.bit(page), ordering: .releasing)
  }

  /// Makes vCPUs ask for a page that none of them has.
  public func set(_ page: Int) {
    precondition(page >= 0 && page < pageCount)
    unsafe words[page / 64].bitwiseOr(Self.bit(page), ordering: .releasing)
  }

  /// Whether a vCPU has to ask.
  public func isSet(_ page: Int) -> Bool {
    precondition(page >= 0 && page < pageCount)
    return unsafe words[page / 64].load(ordering: .acquiring) & Self.bit(page) != 0
  }

  private static func bit(_ page: Int) -> UInt64 { 1 << UInt64(page % 64) }
}
