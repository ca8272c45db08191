// SPDX-License-Identifier: Apache-2.0

public import SystemPackage

/// Why an image could not be read or written, and where.
public struct ImageError: Error, Sendable {
  /// The kind of failure. A struct, so that kinds can be added.
  public struct Code: Hashable, Sendable {
    fileprivate enum Kind {
      case notAnImage, unsupportedVersion, truncated, damaged, invalidLayout, limitExceeded
      case outOfRange, incomplete, inputOutput, ancestorMissing, invalidArgument, changed
    }
    fileprivate let kind: Kind
    private init(_ kind: Kind) { self.kind = kind }

    /// The file is something else.
    public static let notAnImage = Self(.notAnImage)
    /// An image of a version that this build does not read.
    public static let unsupportedVersion = Self(.unsupportedVersion)
    /// The file is shorter than it was when it was written.
    public static let truncated = Self(.truncated)
    /// Bytes do not match their checksum.
    public static let damaged = Self(.damaged)
    /// Fields contradict each other or the format's rules.
    public static let invalidLayout = Self(.invalidLayout)
    /// More than the format allows (`ImageLimits`) or this machine can hold.
    public static let limitExceeded = Self(.limitExceeded)
    /// The caller named a region or blocks that the image does not have.
    public static let outOfRange = Self(.outOfRange)
    /// The image cannot be finished: a write failed before, or it is already closed.
    public static let incomplete = Self(.incomplete)
    /// What the caller wants cannot be: a parent of another machine, blocks that the image does
    /// not have, the name of an image that is needed.
    public static let invalidArgument = Self(.invalidArgument)
    /// An image that it builds on is not where it was.
    public static let ancestorMissing = Self(.ancestorMissing)
    /// Under its path is not what was opened there.
    public static let changed = Self(.changed)
    /// The kernel refused; `errno` says why.
    public static let inputOutput = Self(.inputOutput)
  }

  /// The kind of failure.
  public let code: Code
  /// The image.
  public let path: FilePath
  /// What is wrong, in words.
  public let reason: String
  /// The region's number, if it is about one.
  public let region: Int?
  /// The region's name.
  public let regionName: String?
  /// The 4 KiB block in the region, if it is about one.
  public let block: Int?
  /// Bytes from the start of the file to the place, if there is one.
  public let fileOffset: Int?
  /// What the kernel said, if it was asked.
  public let errno: Errno?

  init(
    _ code: Code, _ path: FilePath, _ reason: String, region: Int? = nil,
    regionName: String? = nil, block: Int? = nil, fileOffset: Int? = nil, errno: Errno? = nil
  ) {
    self.code = code
    self.path = path
    self.reason = reason
    self.region = region
    self.regionName = regionName
    self.block = block
    self.fileOffset = fileOffset
    self.errno = errno
  }
}

// MARK: - Text

extension ImageError: CustomStringConvertible {
  /// What failed, where, why, and what to do about it.
  public var description: String {
    var text = "image \(path)"
    if let region { text += ", region \(region)" + (regionName.map { " (\($0))" } ?? "") }
    if let block { text += ", block \(block)" }
    if let fileOffset { text += ", file offset \(fileOffset)" }
    text += ": \(reason)"
    if let errno { text += ": \(errno)" }
    return "\(text). \(advice)"
  }

  private var advice: String {
    switch code.kind {
    case .notAnImage: "Name the file that a snapshot wrote."
    case .unsupportedVersion: "Use the Faultline release that wrote it, or a newer one."
    case .truncated: "Copy the image again from its source, or take a new snapshot."
    case .damaged:
      "Copy the image again from its source or take a new snapshot, and check the storage."
    case .invalidLayout: "The writer is at fault; take a new snapshot with a Faultline release."
    case .limitExceeded: "docs/image-format.md lists the limits."
    case .outOfRange: "Ask for blocks that the image's regions have."
    case .incomplete: "Remove the cause and take the snapshot again; the target is unchanged."
    case .invalidArgument: "Nothing was changed."
    case .changed:
      "Nothing was changed there. Put a new image under a name of its own, or in the place of an old "
        + "one by renaming it."
    case .ancestorMissing: "Put that image back, or beside this one."
    case .inputOutput:
      errno == .noSpace || errno == .diskQuotaExceeded
        ? "Free space on the filesystem and try again." : "Check the path and the storage."
    }
  }
}
