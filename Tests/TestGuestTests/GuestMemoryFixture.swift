// SPDX-License-Identifier: Apache-2.0

import LinuxSystem
import SystemPackage
import TestGuest
import TestSupport

/// Guest memory of a test; it outlives the guests that a test gives it to.
final class Memory: Sendable {
  let mapping: Mapping
  var range: HostRange { mapping.range }

  init(mebibytes: Int) throws {
    mapping = try Mapping(anonymous: mebibytes << 20, alignment: 2 << 20)
  }

  /// A copy of what a paused guest has.
  func copy() throws -> Memory {
    let copy = try Memory(mebibytes: mapping.length >> 20)
    // SAFETY: both mappings have that length, and the guest is paused.
    unsafe copy.mapping.pointer.copyMemory(from: mapping.pointer, byteCount: mapping.length)
    return copy
  }

  func byte(at offset: Int) -> UInt8 {
    // SAFETY: tests pass offsets within the mapping.
    unsafe mapping.pointer.load(fromByteOffset: offset, as: UInt8.self)
  }

  func flipByte(at offset: Int) {
    // SAFETY: tests pass offsets within the mapping.
    unsafe mapping.pointer.storeBytes(
      of: ~byte(at: offset), toByteOffset: offset, as: UInt8.self)
  }

  /// Whether all pages from the second MiB on are the same.
  func workloadPagesEqual(_ other: Memory) -> Bool {
    (256..<mapping.length / 4096).allSatisfy { page in
      // SAFETY: both mappings have that length.
      let (mine, theirs) = unsafe (
        UnsafeRawBufferPointer(start: mapping.pointer + page * 4096, count: 4096),
        UnsafeRawBufferPointer(start: other.mapping.pointer + page * 4096, count: 4096)
      )
      return unsafe mine.elementsEqual(theirs)
    }
  }
}

/// The kinds of guest that this host can run.
let kinds: [TestGuest.Kind] = Host.hasKVM ? [.kvm, .process] : [.process]
