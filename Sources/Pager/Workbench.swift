// SPDX-License-Identifier: Apache-2.0

internal import LinuxSystem
internal import SystemPackage

/// What one thread resolves faults with: memory into which a source reads, and whether the
/// thread may wait for a source.
@safe
struct Workbench: ~Copyable {
  private let mapping: Mapping
  /// `false`: what a source does not have at hand is left to a thread that may.
  let waits: Bool

  /// - Parameter length: bytes; the largest page that the thread fills, or more.
  init(length: Int, waits: Bool) throws(Errno) {
    mapping = try Mapping(anonymous: length)
    self.waits = waits
    // Now, so that no fault of our own lengthens a fault of the guest.
    try? mapping.advise(.populateWrite, offset: 0, length: length)
  }

  var length: Int { mapping.length }
  @unsafe var pointer: UnsafeMutableRawPointer { unsafe mapping.pointer }
}
