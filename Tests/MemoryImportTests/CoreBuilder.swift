// SPDX-License-Identifier: Apache-2.0

import SystemPackage

/// Writes an ELF64 core by hand, from elf(5) and not from the code under test.
struct CoreBuilder {
  /// One program header, and the bytes that the segment has in the file.
  struct Segment {
    var type: UInt32 = 1
    var address: UInt64 = 0
    /// p_vaddr or p_paddr, the one that `address` is not.
    var otherAddress: UInt64 = 0
    var bytes: [UInt8] = []
    /// p_memsz; `nil`: as many as there are bytes.
    var memoryLength: UInt64?
    /// p_filesz; `nil`: as many as there are bytes.
    var fileLength: UInt64?
    /// p_offset; `nil`: where the bytes are.
    var fileOffset: UInt64?
  }

  var segments: [Segment] = []
  /// Whether `address` is p_paddr, and a note of QEMU's says so.
  var isGuest = true
  /// PN_XNUM: the count in the first section header.
  var isExtended = false
  var count: UInt32?
  var machine: UInt16 = 62

  /// A note as elf(5) has it.
  static func note(owner: String, type: UInt32, _ content: [UInt8]) -> [UInt8] {
    var bytes: [UInt8] = []
    let name = Array(owner.utf8) + [0]
    bytes.add(UInt32(name.count))
    bytes.add(UInt32(content.count))
    bytes.add(type)
    for part in [name, content] {
      bytes += part
      bytes += [UInt8](repeating: 0, count: (4 - part.count % 4) % 4)
    }
    return bytes
  }

  /// The notes that QEMU, or the kernel, writes; with contents that do not matter.
  var notes: [UInt8] {
    var bytes = Self.note(owner: "CORE", type: 1, [UInt8](repeating: 3, count: 21))
    if isGuest { bytes += Self.note(owner: "QEMU", type: 0, [1, 0, 0, 0, 8, 0, 0, 0]) }
    return bytes
  }

  /// The file; header, section header, program headers, then what they have, packed as odd as
  /// it comes.
  func encoded() -> [UInt8] {
    var segments = segments
    segments.insert(Segment(type: 4, bytes: notes, memoryLength: 0), at: 0)
    let count = count ?? UInt32(segments.count)
    var file: [UInt8] = [0x7f, 0x45, 0x4c, 0x46, 2, 1, 1] + [UInt8](repeating: 0, count: 9)
    file.add(4 as UInt16)
    file.add(machine)
    file.add(1 as UInt32)
    file.add(0 as UInt64)
    file.add(128 as UInt64)  // e_phoff
    file.add(64 as UInt64)  // e_shoff
    file.add(0 as UInt32)
    file.add(64 as UInt16)
    file.add(56 as UInt16)
    file.add(isExtended ? 0xffff : UInt16(truncatingIfNeeded: count))
    file.add(64 as UInt16)
    file.add(1 as UInt16)
    file.add(0 as UInt16)
    file += [UInt8](repeating: 0, count: 44)
    file.add(isExtended ? count : 0)  // sh_info
    file += [UInt8](repeating: 0, count: 16)
    var offset = UInt64(128 + 56 * segments.count)
    for segment in segments {
      file.add(segment.type)
      file.add(6 as UInt32)
      file.add(segment.fileOffset ?? offset)
      file.add(isGuest ? segment.otherAddress : segment.address)
      file.add(isGuest ? segment.address : segment.otherAddress)
      file.add(segment.fileLength ?? UInt64(segment.bytes.count))
      file.add(segment.memoryLength ?? UInt64(segment.bytes.count))
      file.add(0 as UInt64)
      offset += UInt64(segment.bytes.count)
    }
    for segment in segments { file += segment.bytes }
    return file
  }
}

extension [UInt8] {
  /// Appends an integer, little-endian.
  mutating func add(_ value: some FixedWidthInteger) {
    for index in 0..<value.bitWidth / 8 {
      append(UInt8(truncatingIfNeeded: value >> (8 * index)))
    }
  }

  /// Replaces an integer, little-endian.
  mutating func set(_ offset: Int, _ value: some FixedWidthInteger) {
    for index in 0..<value.bitWidth / 8 {
      self[offset + index] = UInt8(truncatingIfNeeded: value >> (8 * index))
    }
  }
}
