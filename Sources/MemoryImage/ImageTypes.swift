// SPDX-License-Identifier: Apache-2.0

public import LinuxSystem

/// A contiguous range of guest memory in an image.
public struct ImageRegion: Sendable, Hashable {
  /// What the machine calls it, such as "ram". UTF-8, 1 to 80 bytes.
  public var name: String
  /// Where the guest has it; a multiple of 4 KiB.
  public var guestAddress: GuestAddress
  /// Bytes; a multiple of `pageSize`, not zero.
  public var length: Int
  /// The size of the pages that the memory was taken from. The image's blocks are 4 KiB
  /// whatever it is.
  public var pageSize: PageSize

  /// A region; `length` is in bytes.
  public init(name: String, guestAddress: GuestAddress, length: Int, pageSize: PageSize) {
    self.name = name
    self.guestAddress = guestAddress
    self.length = length
    self.pageSize = pageSize
  }

  /// Blocks of 4 KiB.
  public var blockCount: Int { length / ImageLimits.blockSize }
}

/// The state of one device, opaque to Faultline.
public struct DeviceState: Sendable, Hashable {
  /// The kind of device, such as a four-character code.
  public var type: UInt32
  /// Which one of its kind. A pair of type and instance occurs once in an image.
  public var instance: UInt32
  /// The state, in the form of whoever wrote it.
  public var bytes: [UInt8]

  /// A state.
  public init(type: UInt32, instance: UInt32, bytes: [UInt8]) {
    self.type = type
    self.instance = instance
    self.bytes = bytes
  }
}

/// The random name of one image: two images never have the same.
public struct ImageID: Hashable, Sendable, CustomStringConvertible {
  /// Bytes 0 to 7 in the file, little-endian.
  public let low: UInt64
  /// Bytes 8 to 15.
  public let high: UInt64

  init(low: UInt64, high: UInt64) {
    self.low = low
    self.high = high
  }

  /// From the system's random numbers (getrandom(2)).
  static func random() -> Self {
    Self(low: .random(in: .min ... .max), high: .random(in: .min ... .max))
  }

  /// The 16 bytes in the order of the file, as 32 hexadecimal digits.
  public var description: String {
    [low, high].map { word in
      let digits = String(word.byteSwapped, radix: 16)
      return String(repeating: "0", count: 16 - digits.count) + digits
    }.joined()
  }
}

/// How an image holds its blocks.
public enum ImageEncoding: Sendable, Hashable {
  /// As they are.
  case stored
  /// Compressed by zstd, 1 (fast) to 19 (small).
  case zstd(level: Int)
}

/// How an image is made.
public struct ImageOptions: Sendable, Hashable {
  /// How blocks are held.
  public var encoding: ImageEncoding
  /// Blocks that are compressed together, 1 to 16: more make a smaller image, and a page
  /// that takes longer to read. 1 where blocks are stored as they are.
  public var blocksPerChunk: Int

  /// Options; the defaults compress fast, 32 KiB at a time.
  public init(encoding: ImageEncoding = .zstd(level: 1), blocksPerChunk: Int = 8) {
    self.encoding = encoding
    self.blocksPerChunk = encoding == .stored ? 1 : blocksPerChunk
  }
}

/// The SHA-256 of what an image holds: who knows it knows the content.
public struct ContentID: Hashable, Sendable, CustomStringConvertible {
  static let length = 32
  /// The hash.
  public let bytes: [UInt8]

  init() { bytes = Array(repeating: 0, count: Self.length) }
  init(bytes: some Sequence<UInt8>) { self.bytes = Array(bytes) }

  /// 64 hexadecimal digits.
  public var description: String {
    bytes.map { byte in
      let digits = String(byte, radix: 16)
      return digits.count == 1 ? "0" + digits : digits
    }.joined()
  }
}

/// What was found from a block on.
public struct ImageRun: Sendable, Hashable {
  /// What all blocks of a run are.
  public enum Kind: Sendable {
    /// Zeros; the buffer was not written to.
    case zero
    /// Data, checked, in the buffer.
    case data
  }

  /// What all blocks of the run are.
  public let kind: Kind
  /// Blocks of 4 KiB, at least one.
  public let blockCount: Int

  /// A run of `blockCount` blocks.
  public init(kind: Kind, blockCount: Int) {
    self.kind = kind
    self.blockCount = blockCount
  }
}

/// The limits of the format (docs/image-format.md).
public enum ImageLimits {
  /// Bytes of a block.
  public static let blockSize = 4096
  /// Regions in an image.
  public static let regions = 1024
  /// Bytes of a region's name.
  public static let regionNameBytes = 80
  /// Device states in an image.
  public static let states = 4096
  /// Bytes of all device states.
  public static let stateBytes = 64 << 20
  /// Metadata entries in an image.
  public static let metadataEntries = 1024
  /// Bytes of a metadata key.
  public static let metadataKeyBytes = 255
  /// Bytes of all metadata, with 8 bytes for each entry.
  public static let metadataBytes = 1 << 20
  /// Blocks of a chunk.
  public static let blocksPerChunk = 16
  /// Chunks of an image.
  public static let chunks = 1 << 32
  /// Images that an image builds on.
  public static let ancestors = 64
  /// Bytes of the table of ancestors.
  public static let ancestorBytes = 64 * (48 + 4096)
  /// Bytes of an image.
  public static let fileLength = 1 << 50
}
