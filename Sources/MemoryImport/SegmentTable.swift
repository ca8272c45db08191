// SPDX-License-Identifier: Apache-2.0

internal import LinuxSystem
internal import MemoryImage
internal import SystemPackage

/// A PT_LOAD program header whose range in the file was checked.
struct LoadSegment: Sendable {
  let virtualAddress: UInt64
  let physicalAddress: UInt64
  /// Bytes in memory; not zero, a multiple of 4096, at most `ImportLimits.length`.
  let memoryLength: Int
  /// Bytes in the file, at most those in memory.
  let fileLength: Int
  /// Bytes from the start of the file; 0 for a segment without bytes in the file.
  let fileOffset: Int
  /// Where its program header is.
  let headerOffset: Int
}

/// The program headers of an ELF64 core (elf(5)), checked against the file's length.
struct SegmentTable: ~Copyable {
  private(set) var loads: [LoadSegment] = []
  private(set) var notes: [CoreFile.NoteSegment] = []

  private static let headerLength = 64
  private static let entryLength = 56
  /// Entries that are read at a time.
  private static let batch = 1024

  init(_ file: InputFile) throws(ImportError) {
    let header = try Self.header(of: file)
    let start = header.littleEndian(at: 32, as: UInt64.self)
    let count = try Self.entryCount(header, file)
    let length = UInt64(count * Self.entryLength)
    guard file.contains(offset: start, length: length) else {
      throw ImportError(
        .truncated, file.path,
        "\(count) program headers should be at offset \(start), but the "
          + "file has \(file.length) bytes", fileOffset: 32)
    }
    var memory = 0
    var noteBytes = 0
    for first in stride(from: 0, to: count, by: Self.batch) {
      let entries = min(Self.batch, count - first)
      let offset = Int(start) + first * Self.entryLength
      let bytes = try file.bytes(at: offset, count: entries * Self.entryLength)
      for index in 0..<entries {
        let entry = Entry(bytes, at: index * Self.entryLength)
        let place = offset + index * Self.entryLength
        switch entry.type {
        case 1 where entry.memoryLength > 0:
          let load = try Self.load(entry, file, place)
          memory += load.memoryLength
          guard memory <= ImportLimits.length else {
            throw ImportError(
              .limitExceeded, file.path,
              "its segments have more than \(ImportLimits.length) bytes together",
              fileOffset: place)
          }
          loads.append(load)
        case 4 where entry.fileLength > 0:
          try Self.checkRange(entry, file, place)
          // In the file, so it fits an Int, and the sum is below the limit before.
          noteBytes += Int(min(entry.fileLength, UInt64(ImportLimits.noteBytes) + 1))
          guard noteBytes <= ImportLimits.noteBytes else {
            throw ImportError(
              .limitExceeded, file.path,
              "its notes have more than \(ImportLimits.noteBytes) bytes", fileOffset: place)
          }
          notes.append(
            CoreFile.NoteSegment(
              fileOffset: Int(entry.fileOffset), length: Int(entry.fileLength)))
        default: break
        }
      }
    }
    guard !loads.isEmpty else {
      throw ImportError(
        .invalidLayout, file.path, "none of its \(count) segments is memory (PT_LOAD)")
    }
  }

  // MARK: - Header

  private static func header(of file: InputFile) throws(ImportError) -> [UInt8] {
    let bytes = try file.bytes(at: 0, count: min(file.length, headerLength))
    if let name = ForeignFormat.name(of: bytes) {
      throw ImportError(
        .unsupported, file.path, "it is \(name.format)", remedy: name.remedy, fileOffset: 0)
    }
    guard bytes.starts(with: [0x7f, 0x45, 0x4c, 0x46]) else {
      throw ImportError(.notACore, file.path, "it does not begin as an ELF file", fileOffset: 0)
    }
    guard bytes.count == headerLength else {
      throw ImportError(
        .truncated, file.path, "it has \(bytes.count) bytes, fewer than an ELF header")
    }
    func unsupported(_ reason: String, _ offset: Int) -> ImportError {
      ImportError(
        .unsupported, file.path, reason, remedy: "Name an ELF64 core for x86-64.",
        fileOffset: offset)
    }
    if bytes[4] == 1 {
      throw ImportError(
        .unsupported, file.path, "it is an ELF32 core",
        remedy: "QEMU writes ELF64 when the guest is in 64-bit mode or has memory or firmware up "
          + "to 4 GiB; dump then.", fileOffset: 4)
    }
    guard bytes[4] == 2 else { throw unsupported("its ELF class is \(bytes[4])", 4) }
    guard bytes[5] == 1 else { throw unsupported("it is not little-endian", 5) }
    let version = bytes.littleEndian(at: 20, as: UInt32.self)
    guard bytes[6] == 1, version == 1 else { throw unsupported("its ELF version is not 1", 6) }
    let type = bytes.littleEndian(at: 16, as: UInt16.self)
    guard type == 4 else {
      throw ImportError(
        .notACore, file.path, "it is an ELF file of type \(type), not a core (4)", fileOffset: 16)
    }
    // QEMU writes EM_386 (3) for a guest that is not in 64-bit mode, also in ELF64.
    let machine = bytes.littleEndian(at: 18, as: UInt16.self)
    guard machine == 62 || machine == 3 else {
      throw unsupported("it is for machine \(machine), not x86-64 (62)", 18)
    }
    let size = bytes.littleEndian(at: 54, as: UInt16.self)
    guard size == entryLength else {
      throw ImportError(
        .invalidLayout, file.path, "its program headers have \(size) bytes; 56 are right",
        fileOffset: 54)
    }
    return bytes
  }

  /// e_phnum or, if that is PN_XNUM, sh_info of the first section header.
  private static func entryCount(
    _ header: [UInt8], _ file: InputFile
  ) throws(ImportError) -> Int {
    var count = Int(header.littleEndian(at: 56, as: UInt16.self))
    if count == 0xffff {
      let section = header.littleEndian(at: 40, as: UInt64.self)
      guard section != 0, file.contains(offset: section, length: 64) else {
        throw ImportError(
          .truncated, file.path,
          "the number of its segments should be in a section header at "
            + "offset \(section), but the file has \(file.length) bytes", fileOffset: 40)
      }
      let bytes = try file.bytes(at: Int(section), count: 64)
      count = Int(bytes.littleEndian(at: 44, as: UInt32.self))
    }
    guard count > 0 else {
      throw ImportError(.invalidLayout, file.path, "it has no segments", fileOffset: 56)
    }
    guard count <= ImportLimits.segments else {
      throw ImportError(
        .limitExceeded, file.path,
        "it has \(count) segments; \(ImportLimits.segments) are the limit", fileOffset: 56)
    }
    return count
  }

  // MARK: - Entries

  /// A program header as it is in the file.
  private struct Entry {
    let type: UInt32
    let fileOffset, virtualAddress, physicalAddress, fileLength, memoryLength: UInt64

    init(_ bytes: [UInt8], at offset: Int) {
      type = bytes.littleEndian(at: offset, as: UInt32.self)
      fileOffset = bytes.littleEndian(at: offset + 8, as: UInt64.self)
      virtualAddress = bytes.littleEndian(at: offset + 16, as: UInt64.self)
      physicalAddress = bytes.littleEndian(at: offset + 24, as: UInt64.self)
      fileLength = bytes.littleEndian(at: offset + 32, as: UInt64.self)
      memoryLength = bytes.littleEndian(at: offset + 40, as: UInt64.self)
    }
  }

  private static func load(
    _ entry: Entry, _ file: InputFile, _ place: Int
  ) throws(ImportError) -> LoadSegment {
    guard entry.memoryLength <= UInt64(ImportLimits.length) else {
      throw ImportError(
        .limitExceeded, file.path,
        "a segment has \(entry.memoryLength) bytes; \(ImportLimits.length) are the limit",
        fileOffset: place)
    }
    guard entry.memoryLength % UInt64(ImageLimits.blockSize) == 0 else {
      throw ImportError(
        .invalidLayout, file.path, "a segment has \(entry.memoryLength) bytes",
        remedy: "Lengths must be multiples of 4096; dump again without a filter.",
        fileOffset: place)
    }
    guard entry.fileLength <= entry.memoryLength else {
      throw ImportError(
        .invalidLayout, file.path,
        "a segment has \(entry.fileLength) bytes in the file, more "
          + "than the \(entry.memoryLength) in memory", fileOffset: place)
    }
    // Where there are no bytes the offset means nothing; QEMU writes -1.
    if entry.fileLength > 0 { try checkRange(entry, file, place) }
    return LoadSegment(
      virtualAddress: entry.virtualAddress, physicalAddress: entry.physicalAddress,
      memoryLength: Int(entry.memoryLength), fileLength: Int(entry.fileLength),
      fileOffset: entry.fileLength > 0 ? Int(entry.fileOffset) : 0, headerOffset: place)
  }

  private static func checkRange(
    _ entry: Entry, _ file: InputFile, _ place: Int
  ) throws(ImportError) {
    guard file.contains(offset: entry.fileOffset, length: entry.fileLength) else {
      throw ImportError(
        .truncated, file.path,
        "a segment should have \(entry.fileLength) bytes at offset "
          + "\(entry.fileOffset), but the file has \(file.length) bytes", fileOffset: place)
    }
  }
}

// MARK: - Other formats

/// What people may take for a core.
private enum ForeignFormat {
  static func name(of bytes: [UInt8]) -> (format: String, remedy: String)? {
    let plain = "Dump again without -z, -l, -s and -w (dump-guest-memory FILE)."
    let kdump = "in QEMU's kdump-compressed format"
    let unpack = "Decompress it first."
    let formats: [(magic: [UInt8], format: String, remedy: String)] = [
      (Array("KDUMP   ".utf8), kdump, plain),
      (Array("makedumpfile\0".utf8), kdump + " (flattened)", plain),
      (Array("PAGEDU64".utf8), "a Windows crash dump", plain),
      (Array("PAGEDUMP".utf8), "a Windows crash dump", plain),
      (Array("QEVM".utf8), "a migration stream of QEMU's", "Dump with dump-guest-memory FILE."),
      ([0x28, 0xb5, 0x2f, 0xfd], "compressed by zstd", unpack),
      ([0xfd, 0x37, 0x7a, 0x58, 0x5a, 0], "compressed by xz", unpack),
      ([0x04, 0x22, 0x4d, 0x18], "compressed by lz4", unpack),
      ([0x1f, 0x8b], "compressed by gzip", unpack),
    ]
    for entry in formats where bytes.starts(with: entry.magic) {
      return (entry.format, entry.remedy)
    }
    return nil
  }
}
