// SPDX-License-Identifier: Apache-2.0

public import LinuxSystem
public import SystemPackage

/// Why the memory of a VMM was not taken over.
public struct HandoverError: Error, Sendable {
  /// The kind of failure. A struct, so that kinds can be added.
  public struct Code: Hashable, Sendable {
    fileprivate enum Kind: String {
      case malformed
      case limitExceeded = "limit_exceeded"
      case unsupportedVersion = "unsupported_version"
      case notAllowed = "not_allowed"
      case invalidRegions = "invalid_regions"
      case invalidDescriptor = "invalid_descriptor"
      case imageMismatch = "image_mismatch"
      case unknownImage = "unknown_image"
      case unsupported, busy
      case noMemory = "no_memory"
      case timedOut = "timed_out"
      case disconnected, cancelled
      case inputOutput = "internal"
    }
    fileprivate let kind: Kind
    private init(_ kind: Kind) { self.kind = kind }

    /// The message is not what the protocol says.
    public static let malformed = Self(.malformed)
    /// More bytes, regions or descriptors than are taken.
    public static let limitExceeded = Self(.limitExceeded)
    /// A version of the protocol that is not spoken.
    public static let unsupportedVersion = Self(.unsupportedVersion)
    /// The peer's user may not hand over memory here.
    public static let notAllowed = Self(.notAllowed)
    /// Regions are misaligned, empty, out of range, or overlap.
    public static let invalidRegions = Self(.invalidRegions)
    /// A descriptor is missing, superfluous, or of the wrong kind.
    public static let invalidDescriptor = Self(.invalidDescriptor)
    /// The regions are not those of the image.
    public static let imageMismatch = Self(.imageMismatch)
    /// There is no image of that name, or it cannot be opened.
    public static let unknownImage = Self(.unknownImage)
    /// The request is right, but this service does not do that.
    public static let unsupported = Self(.unsupported)
    /// No memory for the image's pages, such as too few free huge pages.
    public static let noMemory = Self(.noMemory)
    /// No room for another session.
    public static let busy = Self(.busy)
    /// The message was not complete in time.
    public static let timedOut = Self(.timedOut)
    /// The peer closed the connection before its message was complete, or is gone.
    public static let disconnected = Self(.disconnected)
    /// The stop sign ended the wait.
    public static let cancelled = Self(.cancelled)
    /// The kernel refused; `errno` says why.
    public static let inputOutput = Self(.inputOutput)

    /// The code in docs/handover.md.
    public var name: String { kind.rawValue }
  }

  /// The kind of failure.
  public let code: Code
  /// What is wrong, in words.
  public let reason: String
  /// The region's place in the message, from 0, if it is about one.
  public let region: Int?
  /// Who handed over, once that is known.
  public internal(set) var peer: PeerCredentials?
  /// What the kernel said, if it was asked.
  public let errno: Errno?

  /// An error; `reason` says what is wrong, without a full stop.
  public init(
    _ code: Code, _ reason: String, region: Int? = nil, peer: PeerCredentials? = nil,
    errno: Errno? = nil
  ) {
    self.code = code
    self.reason = reason
    self.region = region
    self.peer = peer
    self.errno = errno
  }
}

// MARK: - Text

extension HandoverError: CustomStringConvertible {
  /// What failed, why, and what to do about it.
  public var description: String {
    let sender = peer.map { " from \($0)" } ?? ""
    return "hand-over\(sender): \(reasonInFull). \(advice)"
  }

  /// What is wrong and where, without the sender and advice: what the peer is told.
  var reasonInFull: String {
    var text = region.map { "region \($0): " } ?? ""
    text += reason
    if let errno { text += ": \(errno)" }
    return text
  }

  private var advice: String {
    switch code.kind {
    case .malformed: "The VMM speaks another protocol, or another version of it."
    case .limitExceeded: "Give the VMM fewer, larger regions, or raise the limit."
    case .unsupportedVersion: "Use a client of this version, or a newer service."
    case .unknownImage: "Name an image that the service has."
    case .unsupported: "See docs/handover.md for what there is."
    case .busy: "Try again when another VM has ended."
    case .noMemory:
      "Give this machine more huge pages (vm.nr_hugepages), or ask for pages of 4096 bytes."
    case .notAllowed: "Allow the user, or run the VMM as one that is allowed."
    case .invalidRegions, .invalidDescriptor: "The VMM is at fault."
    case .imageMismatch: "Serve the image that was made of this VM's memory file."
    case .timedOut: "The VMM hangs, or it is something else that connected."
    case .disconnected: "See what the VMM says of it."
    case .cancelled: "Start the VMM again when the service is up."
    case .inputOutput:
      errno == .noSuchProcess ? "The VMM is gone." : "Check this machine's limits (ulimit -n)."
    }
  }
}
