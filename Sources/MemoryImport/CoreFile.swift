// SPDX-License-Identifier: Apache-2.0

public import SystemPackage

/// An ELF64 core for x86-64, as gcore(1), the kernel (core(5)) and QEMU's `dump-guest-memory`
/// write it.
///
/// Addresses. QEMU's segments say guest-physical addresses in p_paddr, those of a process
/// virtual ones in p_vaddr. Which it is shows in the notes: QEMU writes one with the owner
/// "QEMU" for each processor. Without it, and with p_paddr zero in all segments, it is a
/// process. Everything else is refused, unless the caller says what it is.
///
/// Alignment. Addresses and lengths in memory must be multiples of 4096; the place in the file
/// need not be, and in the cores of both it is not.
///
/// Missing bytes. Where p_filesz is less than p_memsz the rest of a process's segment reads as
/// zeros, as ELF has it. But gcore and the kernel write so what they leave out (see core(5),
/// coredump_filter): `absentBytes` counts it. In a guest's core it is refused: `-p` makes QEMU
/// merge mappings over the borders of its memory blocks, and then the segment covers guest
/// memory that is not zero and that no segment says the place of.
///
/// Overlap is refused, but for what `-p` makes: segments of a guest may overlap where they
/// name the same bytes of the file.
public struct CoreFile: Sendable {
  /// Whose memory it is.
  public enum Kind: Sendable, Hashable {
    /// A guest: regions are guest-physical.
    case guest
    /// A process: regions are its virtual addresses.
    case process
  }

  /// A PT_NOTE segment (elf(5)).
  public struct NoteSegment: Sendable, Hashable {
    /// Bytes from the start of the file.
    public let fileOffset: Int
    /// Bytes.
    public let length: Int
  }

  /// Whose memory it is.
  public let kind: Kind
  /// The memory, ordered by address; segments without a gap between them are one region.
  public let input: MemoryInput
  /// Bytes of the segments that the file does not have and that read as zeros.
  public let absentBytes: Int
  /// The notes, in the order of the file.
  public let noteSegments: [NoteSegment]

  private let file: InputFile

  /// Opens a core and checks its headers; its memory is not read.
  ///
  /// - Parameter kind: whose memory it is, where the file does not say; `nil` finds out.
  /// - Throws: `notRegular`, `notACore`, `unsupported` (ELF32, kdump-compressed and others, by
  ///   name), `truncated`, `invalidLayout`, `overlap`, `limitExceeded`, `inputOutput`.
  public init(_ path: FilePath, kind: Kind? = nil) throws(ImportError) {
    let file = try InputFile(path)
    let table = try SegmentTable(file)
    let found: Kind
    if let kind {
      found = kind
    } else if try CoreNotes.haveOwner("QEMU", in: table.notes, of: file) {
      found = .guest
    } else if table.loads.allSatisfy({ $0.physicalAddress == 0 }) {
      found = .process
    } else {
      throw ImportError(
        .unsupported, path,
        "it has physical addresses (p_paddr) but no note of QEMU's, so it is not known whether "
          + "they or the virtual ones (p_vaddr) are meant",
        remedy: "Name a core of gcore(1) or of QEMU's dump-guest-memory, or say which it is.")
    }
    let plan = try CorePlan(table.loads, kind: found, path: path)
    self.file = file
    self.kind = found
    input = MemoryInput(regions: plan.regions, layers: [file], pieces: plan.pieces)
    absentBytes = plan.absentBytes
    noteSegments = table.notes
  }

  /// Reads the bytes of a note segment.
  ///
  /// - Throws: `outOfRange` for one that this core does not have, `changed`, `inputOutput`.
  public func bytes(of segment: NoteSegment) throws(ImportError) -> [UInt8] {
    guard noteSegments.contains(segment) else {
      throw ImportError(.outOfRange, file.path, "it has no such note segment")
    }
    return try file.bytes(at: segment.fileOffset, count: segment.length)
  }
}

// MARK: - Notes

/// The notes of a core (elf(5), "Notes"): entries of three words, a name and a description,
/// each padded to 4 bytes.
enum CoreNotes {
  /// Whether there is a note of an owner.
  static func haveOwner(
    _ owner: String, in segments: [CoreFile.NoteSegment], of file: InputFile
  ) throws(ImportError) -> Bool {
    let wanted = Array(owner.utf8)
    for segment in segments {
      let bytes = try file.bytes(at: segment.fileOffset, count: segment.length)
      var position = 0
      while bytes.count - position >= 12 {
        let nameLength = Int(bytes.littleEndian(at: position, as: UInt32.self))
        let contentLength = Int(bytes.littleEndian(at: position + 4, as: UInt32.self))
        let name = position + 12
        // Two lengths of 32 bits do not overflow.
        let content = name + (nameLength + 3) & ~3
        guard content + contentLength <= bytes.count else {
          throw ImportError(
            .invalidLayout, file.path,
            "a note of \(nameLength) + \(contentLength) bytes passes "
              + "the end of its segment", fileOffset: segment.fileOffset + position)
        }
        // The name ends with a zero byte.
        if nameLength == wanted.count + 1,
          bytes[name..<name + wanted.count].elementsEqual(wanted), bytes[name + wanted.count] == 0
        {
          return true
        }
        position = content + (contentLength + 3) & ~3
      }
    }
    return false
  }
}

extension [UInt8] {
  /// An integer at an offset; the caller makes sure that it is there.
  func littleEndian<Integer: FixedWidthInteger & UnsignedInteger>(
    at offset: Int, as type: Integer.Type
  ) -> Integer {
    var value: Integer = 0
    for index in (0..<MemoryLayout<Integer>.size).reversed() {
      value = value << 8 | Integer(truncatingIfNeeded: self[offset + index])
    }
    return value
  }
}
