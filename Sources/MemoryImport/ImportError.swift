// SPDX-License-Identifier: Apache-2.0

public import SystemPackage

/// Why memory could not be read from a file of somebody else's, or written as a raw file.
public struct ImportError: Error, Sendable {
  /// The kind of failure. A struct, so that kinds can be added.
  public struct Code: Hashable, Sendable {
    fileprivate enum Kind {
      case notRegular, notACore, unsupported, truncated, changed, invalidLayout, overlap
      case limitExceeded, lengthMismatch, holesUnknown, outOfRange, source, image
      case inputOutput
    }
    fileprivate let kind: Kind
    private init(_ kind: Kind) { self.kind = kind }

    /// A directory, a FIFO, a device or a socket.
    public static let notRegular = Self(.notRegular)
    /// The file is no ELF core.
    public static let notACore = Self(.notACore)
    /// A format that is known by name and not read: ELF32, kdump-compressed, and others.
    public static let unsupported = Self(.unsupported)
    /// The file ends before what its headers promise.
    public static let truncated = Self(.truncated)
    /// The file became shorter or longer after it was opened.
    public static let changed = Self(.changed)
    /// Lengths, addresses or offsets that are not allowed.
    public static let invalidLayout = Self(.invalidLayout)
    /// Two segments claim the same memory.
    public static let overlap = Self(.overlap)
    /// More than `ImportLimits` allows.
    public static let limitExceeded = Self(.limitExceeded)
    /// A diff is not as long as its base, or regions not as long as their file.
    public static let lengthMismatch = Self(.lengthMismatch)
    /// The filesystem does not say where a diff has holes.
    public static let holesUnknown = Self(.holesUnknown)
    /// The caller named a region or bytes that are not there.
    public static let outOfRange = Self(.outOfRange)
    /// What was to be written could not be read; `cause` says why.
    public static let source = Self(.source)
    /// The image could not be written; `cause` says why.
    public static let image = Self(.image)
    /// The kernel refused; `errno` says why.
    public static let inputOutput = Self(.inputOutput)
  }

  /// The kind of failure.
  public let code: Code
  /// The file.
  public let path: FilePath
  /// What is wrong, in words.
  public let reason: String
  /// What would be right, or what to do, where `code` alone does not tell.
  public let remedy: String?
  /// Bytes from the start of the file to the place, if there is one.
  public let fileOffset: Int?
  /// What the kernel said, if it was asked.
  public let errno: Errno?
  /// The error of the source, or of the image that was written.
  public let cause: (any Error)?

  init(
    _ code: Code, _ path: FilePath, _ reason: String, remedy: String? = nil,
    fileOffset: Int? = nil, errno: Errno? = nil, cause: (any Error)? = nil
  ) {
    self.code = code
    self.path = path
    self.reason = reason
    self.remedy = remedy
    self.fileOffset = fileOffset
    self.errno = errno
    self.cause = cause
  }
}

// MARK: - Text

extension ImportError: CustomStringConvertible {
  /// What failed, where, why, and what to do about it.
  public var description: String {
    // The image's own error names the image.
    if code == .image, let cause { return "\(cause)" }
    var text = "\(path)"
    if let fileOffset { text += ", file offset \(fileOffset)" }
    text += ": \(reason)"
    if let errno { text += ": \(errno)" }
    // A cause has its own advice.
    if let cause { return text + ": \(cause)" }
    return "\(text). \(remedy ?? advice)"
  }

  private var advice: String {
    switch code.kind {
    case .notRegular: "Name a regular file."
    case .notACore: "Name a core of gcore(1) or of QEMU's dump-guest-memory."
    case .unsupported: "Dump again as ELF64, without compression."
    case .truncated: "Copy the file again from its source, or dump again."
    case .changed: "Wait until whoever writes it is done, and begin again."
    case .invalidLayout: "Dump again; if that does not help the writer of the file is at fault."
    case .overlap: "Each byte of memory may be in one segment only."
    case .limitExceeded: "ImportLimits lists what is read."
    case .lengthMismatch: "Name files of the same machine."
    case .holesUnknown:
      "Take diffs on a filesystem that keeps single pages and reports holes, such as ext4 or XFS."
    case .outOfRange: "Ask for bytes that the regions have."
    case .source, .image: "The target is unchanged; remove the cause and try again."
    case .inputOutput:
      errno == .noSpace || errno == .diskQuotaExceeded
        ? "Free space on the filesystem and try again; nothing was left behind."
        : "Check the path and the storage."
    }
  }
}

/// What is read at most, so that a hostile file costs bounded memory and time.
public enum ImportLimits {
  /// Program headers of a core: twice what a Linux process may have mappings by default.
  public static let segments = 1 << 17
  /// Bytes of all note segments of a core.
  public static let noteBytes = 64 << 20
  /// Diffs over one base.
  public static let diffs = 1024
  /// Bytes of an input, holes included.
  public static let length = 1 << 50
}
